"""Turn a hand-off into one file for other runtimes: ``python -m pretrain.convert HANDOFF OUT.onnx``, or ``OUT.pt2``.

Both take normalized images (batch, 3, height, width) of one size, any batch, and give logits (batch, classes). They
contain what is needed to use them: class names, mean and standard deviation, and where the weights come from.
"""

import argparse
import io
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from models import LaViT, load_weights
from pretrain.arguments import add_trust_argument
from pretrain.factory import users_code
from pretrain.files import fsync
from pretrain.handoff.folder import HandoffConfig, load_handoff
from pretrain.outcome import ExitCode, UserError

TOLERANCE = 1e-4
"""Largest difference of a logit from torch's with which a file is published."""
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
LIMIT = 2**31 - 2**24
"""Bytes of weights that fit in one ONNX file, a protobuf message below 2 GiB, with a graph."""
METADATA = "lavit.json"
"""Name of the metadata inside a pt2 file; an ONNX file has one property for each of its fields."""
_KEPT = {"class_names", "class_ids", "class_levels", "weights", "weights_blake2", "dataset", "metrics"}

Forward = Callable[[Tensor], Tensor]


def convert(
    handoff: Path | str, out: Path, *, image_size: tuple[int, int] | None = None, trust_factory: bool = False
) -> str:
    """Write a hand-off as one file, run the file on random and extreme images, and publish it if it is correct.

    Args:
        handoff: a folder or a name of the Hugging Face Hub, as `load_handoff` takes it.
        out: ends with ``.onnx`` or ``.pt2`` (``torch.export``); an older file is replaced once the new one was checked.
        image_size: height and width in pixels; None takes the hand-off's. Parameters are resampled.
        trust_factory: as for ``load_handoff``.

    Returns:
        a line: what was written, and by how much its logits differ from torch's.

    Raises:
        UserError: no hand-off, an impossible size, missing packages, a file that cannot be written, or one whose logits
            differ from torch's by more than ``TOLERANCE``. ``out`` is untouched then.
    """
    if out.suffix not in {".onnx", ".pt2"}:
        raise UserError(f"{out}: the name must end with .onnx or .pt2")
    is_onnx = out.suffix == ".onnx"
    kind, write, load = ("ONNX", _onnx, _load_onnx) if is_onnx else ("torch.export", _pt2, _load_pt2)
    if not out.parent.is_dir() or out.is_dir():
        raise UserError(f"{out}: {'it is a folder' if out.is_dir() else f'the folder {out.parent} does not exist'}")
    if is_onnx and (missing := [name for name in PACKAGES if find_spec(name) is None]):
        raise UserError(f"ONNX files need {', '.join(missing)}: pip install -c constraints.txt -e '.[onnx]'")
    reference, config = load_handoff(handoff, trust_factory=trust_factory)
    size, name = image_size or config.input.size, config.architecture["name"]
    model = _at_size(reference, size)
    held = sum(tensor.nbytes for tensor in model.state_dict().values())
    if is_onnx and held > LIMIT:
        raise UserError(f"{out}: {held / 2**30:.1f} GiB of weights, an ONNX file holds less than 2: write a .pt2 file")
    metadata = config.model_dump(mode="json", include=_KEPT) | {
        "name": name,
        "image_size": size,
        **config.input.model_dump(mode="json", include={"mean", "std", "interpolation", "eval_crop_ratio"}),
    }
    part = out.with_name(out.name + ".part")
    try:
        part.touch()  # a folder that cannot be written to is noticed before the export
        with _quiet(), users_code(f"{name} cannot be exported for images of {size}"):
            content = write(_program(model, size), metadata)
        part.write_bytes(content)
        difference, images = _compare(reference, load(part), config, size)
        if not difference <= TOLERANCE:  # NaN must not pass
            raise UserError(
                f"{out} was not written: its logits would differ from torch's by {difference:.1e}, "
                f"more than {TOLERANCE:g}"
            )
        fsync(part)
        part.replace(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            part.unlink()
    return (
        f"{out}: {kind}, (batch, 3, {size[0]}, {size[1]}) to (batch, {config.num_classes}); logits of {images} images "
        f"differ from torch's by at most {difference:.1e}"
    )


def _at_size(reference: torch.nn.Module, size: tuple[int, int]) -> torch.nn.Module:
    """The same network; a LaViT with parameters for `size`, so that the file has nothing to resample."""
    if not isinstance(reference, LaViT):
        return reference
    fields = reference.config.to_dict() | {"image_size": list(size)}
    try:
        model = LaViT(type(reference.config).from_dict(fields)).eval()
    except ValueError as error:
        raise UserError(str(error)) from None
    load_weights(model, reference.state_dict())
    return model


def _program(model: torch.nn.Module, size: tuple[int, int]) -> ExportedProgram:
    """The network as a graph with a free batch size."""
    example = torch.zeros(2, 3, *size)  # two, as torch makes constants of sizes 0 and 1
    with torch.no_grad():
        return torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def _onnx(program: ExportedProgram, metadata: dict[str, Any]) -> bytes:
    exported = torch.onnx.export(program, input_names=["images"], output_names=["logits"], verbose=False)
    assert exported is not None
    proto = exported.model_proto
    for key, value in metadata.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, json.dumps(value)
    return proto.SerializeToString()


def _pt2(program: ExportedProgram, metadata: dict[str, Any]) -> bytes:
    content = io.BytesIO()  # by way of memory, as torch's writer ends the process on a full disk
    torch.export.save(program, content, extra_files={METADATA: json.dumps(metadata)})
    return content.getvalue()


def _load_onnx(path: Path) -> Forward:
    import onnxruntime  # noqa: PLC0415 - an optional extra

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _load_pt2(path: Path) -> Forward:
    with path.open("rb") as stream:
        return torch.export.load(stream).module()


@torch.no_grad()
def _compare(reference: Forward, forward: Forward, config: HandoffConfig, size: tuple[int, int]) -> tuple[float, int]:
    """The largest difference of a logit over batches of 1, 3 and 4 images, and their number.

    Noise; then black, white, the mean color, and noise a hundred times too strong. Where an image's logits are above 1,
    it is relative to the largest of them: their rounding is.
    """
    noise = torch.randn(5, 3, *size, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.input.mean, config.input.std))
    plain = [((color - mean) / std).expand(3, *size) for color in (torch.zeros(1), torch.ones(1), mean)]
    batches = (noise[:1], noise[1:4], torch.stack([*plain, 100 * noise[4]]))
    expected = [reference(batch) for batch in batches]
    differences = [
        ((forward(batch) - logits).abs().amax(1) / logits.abs().amax(1).clamp(min=1))
        for batch, logits in zip(batches, expected, strict=True)
    ]
    return torch.cat(differences).max().item(), sum(map(len, differences))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notices about operators that no LaViT has, and torch's about itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def main(arguments: list[str] | None = None) -> int:
    """Write a hand-off as one ONNX or torch.export file; it is compared with torch before it is published."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.convert", description=main.__doc__)
    parser.add_argument("handoff", metavar="HANDOFF", help="runs/NAME/handoff, or a name of the Hugging Face Hub")
    parser.add_argument("out", type=Path, metavar="OUT", help="OUT.onnx or OUT.pt2")
    parser.add_argument(
        "--image-size", type=int, nargs="+", metavar="N", help="side of the images in pixels, or height and width"
    )
    add_trust_argument(parser)
    given = parser.parse_args(arguments)
    sides = given.image_size
    if sides is not None and len(sides) > 2:
        parser.error(f"--image-size: one or two numbers, got {len(sides)}")
    size = None if sides is None else (sides[0], sides[-1])
    try:
        print(convert(given.handoff, given.out, image_size=size, trust_factory=given.trust_factory))  # noqa: T201
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return ExitCode.WILL_FAIL_AGAIN
    return ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(main())
