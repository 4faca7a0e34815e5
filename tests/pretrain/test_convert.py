"""A hand-off as ONNX and torch.export files: the same numbers, all that is needed inside, complete or absent."""

import json
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from models import LaViT, create_model
from pretrain import convert as command
from pretrain.convert import METADATA, TOLERANCE, convert, main
from pretrain.handoff.folder import HandoffConfig, load_handoff
from pretrain.outcome import UserError
from tests.pretrain import handoffs

NAMES = ["cat", "dög", "cow, calf"]


def hand_off(folder: Path, name: str, **options: Any) -> Path:
    """A hand-off whose every weight matters, Psi, Theta and the attention residual included."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=len(NAMES), **options)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            matters = any(part in parameter_name for part in ("psi", "theta", "gamma", "pool", "head", "bias"))
            parameter.add_(torch.randn_like(parameter), alpha=(0.3 if matters else 0.02) / parameter.shape[-1] ** 0.5)
    data = {"mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.1]}
    return handoffs.hand_off(folder, model, class_names=NAMES, class_ids=["n1", "n2", "n3"], input=data)


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hand_off(tmp_path_factory.mktemp("handoff") / "h", "lavit_micro", depths=(1, 1, 2, 1))


def run_onnx(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@torch.no_grad()
def largest_difference(model: LaViT, forward: Callable[[torch.Tensor], torch.Tensor], size: tuple[int, int]) -> float:
    """Over batches of 1 and 4; their logits must differ from image to image, or nothing is compared."""
    torch.manual_seed(1)
    differences = []
    for count in (1, 4):
        images = torch.randn(count, 3, *size)
        images[-1] = images[-1].sign() * 5
        logits = model(images)
        assert count == 1 or logits.std(0).max() > 100 * TOLERANCE
        differences.append((forward(images) - logits).abs().max().item())
    return max(differences)


@pytest.mark.slow
def test_a_published_network_at_another_size_gives_torchs_logits_and_holds_what_is_needed_around_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file holds what was resampled once; torch resamples at every call."""
    folder, written = hand_off(tmp_path / "h", "lavit_tiny", pool="mean"), tmp_path / "out/model.onnx"
    written.parent.mkdir()
    assert main([str(folder), str(written), "--image-size", "64", "96"]) == 0
    assert (
        "(batch, 3, 64, 96) to (batch, 3); logits of 8 images differ from torch's by at most" in capsys.readouterr().out
    )
    model, config = load_handoff(folder)
    assert largest_difference(model, run_onnx(written), (64, 96)) <= TOLERANCE
    onnx.checker.check_model(written, full_check=True)
    check_metadata({entry.key: json.loads(entry.value) for entry in onnx.load(written).metadata_props}, config)
    assert list(written.parent.iterdir()) == [written]


def test_a_program_of_torch_export_gives_the_same_bits_and_holds_what_is_needed_around_them(
    micro: Path, tmp_path: Path
) -> None:
    written = tmp_path / "model.pt2"
    written.write_text("the file before")
    done = convert(micro, written, image_size=(64, 96))
    assert "torch.export, (batch, 3, 64, 96) to (batch, 3); logits of 8 images differ from torch's by at most" in done
    model, config = load_handoff(micro)
    extra = {METADATA: ""}
    program = torch.export.load(written, extra_files=extra)
    assert largest_difference(model, program.module(), (64, 96)) <= TOLERANCE
    check_metadata(json.loads(extra[METADATA]), config)
    assert list(tmp_path.iterdir()) == [written]


def check_metadata(found: dict[str, Any], config: HandoffConfig) -> None:
    assert (found["class_names"], found["class_ids"]) == (NAMES, ["n1", "n2", "n3"])
    assert (found["mean"], found["std"]) == ([0.5, 0.4, 0.3], [0.3, 0.2, 0.1])
    assert found["image_size"] == [64, 96]
    assert found["weights_blake2"] == config.weights_blake2
    assert found["interpolation"] == "bicubic"


@pytest.mark.parametrize("harm", [1e-3, float("nan"), 0.0], ids=["other numbers", "nan", "a full disk"])
def test_what_cannot_be_written_as_it_should_leaves_the_file_before_and_nothing_unfinished(
    harm: float, micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a file that stands in for the export, which takes long."""
    model, limits, out = load_handoff(micro)[0], resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / "model.pt2"
    monkeypatch.setattr(command, "_program", lambda *_: None)
    monkeypatch.setattr(command, "_pt2", lambda *_: bytes(2**17))
    monkeypatch.setattr(command, "_load_pt2", lambda path: lambda images: model(images) + harm)
    out.write_text("the file before")
    message = "was not written: its logits would differ from torch's by" if harm else "cannot be written"
    if not harm:  # no file may grow beyond 64 KiB: what a write sees is as on a full disk, but for the error's number
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        with pytest.raises(UserError, match=f"{out} {message}"):
            convert(micro, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert out.read_text() == "the file before"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.bin"], "must end with .onnx or .pt2"),
        (["nowhere/model.onnx"], "the folder .*nowhere does not exist"),
        (["model.onnx", "--image-size", "50"], "each side must be a multiple of 32"),
    ],
)
def test_what_cannot_work_is_one_line(
    arguments: list[str], message: str, micro: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(micro), str(tmp_path / arguments[0]), *arguments[1:]]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.startswith("error: ")
    assert re.search(message, line), line
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_and_too_large_weights_are_refused_with_the_way_out(
    micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "LIMIT", 1000)
    with pytest.raises(UserError, match=r"an ONNX file holds less than 2: write a \.pt2 file"):
        convert(micro, tmp_path / "model.onnx")
    monkeypatch.setattr(command, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"onnx, onnxruntime, onnxscript: pip install -c constraints.txt .*\[onnx\]"):
        convert(micro, tmp_path / "model.onnx")
