"""What the training input costs: our loader against webdataset + Pillow and against DALI's own reader.

    python -m benchmarks.data                 # decodes on the GPU where there is one
    python -m benchmarks.data --device cpu

Each contestant reads the same shards and does the same: random resized crop to 224, flip, normalise. They take turns,
each turn in a fresh process, and the medians over the rounds are compared. The measure is images per CPU-second: all
threads and worker processes are counted, so that it does not depend much on how busy the machine is otherwise; on a GPU
the clock says more. There our loader runs twice: as it comes, for pixels that do not depend on the batch, and with the
JPEG engine's share that DALI's own reader has by default. Prints a table and writes a section of
benchmarks/results/bench-DATE-MACHINE.json.
"""

import argparse
import io
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import webdataset
from nvidia.dali import Pipeline, fn, types
from PIL import Image

from benchmarks import tables
from benchmarks.photographs import build_shards
from benchmarks.report import Section, add_common, cores, fill_in, say
from data_pipeline.dataset import Dataset
from data_pipeline.loader import TrainLoader
from data_pipeline.transforms import IMAGENET_MEAN, IMAGENET_STD, AugmentConfig, InputConfig, RandomResizedCropConfig

SIDE = 224
BATCH = {"cuda": 256, "cpu": 64}
"""Pictures, by device."""
WITH_ENGINE = "ours, hardware decoder"
ENGINE_SHARE = 0.65
"""Of a batch, that a GPU's JPEG engine decodes by DALI's default."""
_MEAN, _STD = torch.tensor(IMAGENET_MEAN)[:, None, None], torch.tensor(IMAGENET_STD)[:, None, None]


def ours(folder: Path, device: torch.device, batch: int, **settings: Any) -> Iterator[torch.Tensor]:
    """Yield batches of our loader with settings of its `InputConfig`."""
    augment = AugmentConfig(random_resized_crop=RandomResizedCropConfig(), horizontal_flip=0.5)
    config = InputConfig(path=folder, interpolation="bilinear", augment=augment, **settings)
    loader = TrainLoader(
        Dataset.open(folder, "train"),
        config,
        seed=0,
        global_batch=batch,
        micro_batch=batch,
        rank=0,
        world_size=1,
        device=device,
    )
    for ready in loader:
        yield ready.images


def native(folder: Path, device: torch.device, batch: int, *, threads: int) -> Iterator[torch.Tensor]:
    """Yield batches of DALI's own webdataset reader and its own random operators."""
    shards = sorted(folder.glob("*.tar"))
    gpu = device.type == "cuda"
    pipe = Pipeline(batch, threads, 0 if gpu else None)
    with pipe:
        jpeg, _ = fn.readers.webdataset(
            paths=[str(path) for path in shards],
            index_paths=[str(path.with_suffix(".idx")) for path in shards],
            ext=["jpg", "cls"],
            random_shuffle=True,
            initial_fill=512,
            missing_component_behavior="error",
        )
        images = fn.decoders.image_random_crop(jpeg, device="mixed" if gpu else "cpu", random_area=(0.08, 1.0))
        images = fn.resize(images, size=(SIDE, SIDE), interp_type=types.INTERP_LINEAR, antialias=True)
        pipe.set_outputs(
            fn.crop_mirror_normalize(
                images,
                dtype=types.FLOAT,
                output_layout="CHW",
                mirror=fn.random.coin_flip(),
                mean=[255 * value for value in IMAGENET_MEAN],
                std=[255 * value for value in IMAGENET_STD],
            )
        )
    while True:
        (out,) = pipe.run()
        tensor = out.as_tensor()
        # No copy on the CPU, as in DALI's iterator for torch and in our loader.
        yield torch.utils.dlpack.from_dlpack(tensor) if gpu else torch.from_numpy(np.asarray(tensor))


def _augmented(jpeg: bytes, side: int, resampling: Image.Resampling) -> torch.Tensor:
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    rng = np.random.default_rng()
    box = (0, 0, image.width, image.height)
    for _ in range(10):
        area = image.width * image.height * rng.uniform(0.08, 1)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if w <= image.width and h <= image.height:
            left, top = int(rng.integers(0, image.width - w + 1)), int(rng.integers(0, image.height - h + 1))
            box = (left, top, left + w, top + h)
            break
    image = image.crop(box).resize((side, side), resampling)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # As torchvision's ToTensor: made contiguous while it is a quarter of the size.
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
    return pixels.sub_(_MEAN).div_(_STD)


def pillow_loader(
    folder: Path,
    workers: int,
    batch: int,
    *,
    side: int = SIDE,
    resampling: Image.Resampling = Image.Resampling.BILINEAR,
    pinned: bool = False,
) -> torch.utils.data.DataLoader:
    """A torch DataLoader with webdataset and Pillow in its workers; every rank and worker draws shards of its own.

    Args:
        folder: of the shards.
        workers: processes.
        batch: pictures of a batch.
        side: of the pictures, in pixels.
        resampling: how Pillow resizes.
        pinned: batches lie in page-locked memory, from which a GPU copies by itself.

    Returns:
        batches without end: images (batch, 3, side, side) float32, normalised; labels (batch,) int64.
    """
    shards = sorted(str(path) for path in folder.glob("*.tar"))
    read = webdataset.WebDataset(
        shards, resampled=True, shardshuffle=False, nodesplitter=webdataset.split_by_node
    ).shuffle(512)
    augmented = partial(_augmented, side=side, resampling=resampling)
    return torch.utils.data.DataLoader(
        read.to_tuple("jpg", "cls").map_tuple(augmented, int), batch_size=batch, num_workers=workers, pin_memory=pinned
    )


def pillow(folder: Path, device: torch.device, batch: int, *, threads: int) -> Iterator[torch.Tensor]:
    """Yield batches of `pillow_loader`; pinned for a GPU, as one would."""
    gpu = device.type == "cuda"
    for images, _ in pillow_loader(folder, threads, batch, pinned=gpu):
        yield images.to(device, non_blocking=gpu)


def cpu_seconds() -> float:
    """Return the processor time of this process and of its children that live."""
    process = psutil.Process()
    times = [p.cpu_times() for p in (process, *process.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def measure(batches: Iterator[torch.Tensor], count: int, batch: int) -> tuple[float, float]:
    """Return images per CPU-second and per second of the clock over `count` batches."""
    cpu, clock = cpu_seconds(), time.perf_counter()
    for images in itertools.islice(batches, count):
        last = images
    if last.is_cuda:
        torch.cuda.synchronize()
    return count * batch / (cpu_seconds() - cpu), count * batch / (time.perf_counter() - clock)


CONTESTANTS: dict[str, Callable[..., Iterator[torch.Tensor]]] = {
    "ours": ours,
    WITH_ENGINE: partial(ours, hw_decoder_load=ENGINE_SHARE),
    "DALI's own reader": native,
    "webdataset + Pillow": pillow,
}
"""Each called with folder, device, pictures in a batch, and settings, of which all know ``threads``."""


def contestants(device: str) -> list[str]:
    """Who is measured on a device."""
    return [name for name in CONTESTANTS if device == "cuda" or name != WITH_ENGINE]


def turn(name: str, folder: Path, options: argparse.Namespace, settings: dict[str, Any]) -> tuple[float, float]:
    """Measure a contestant in a process of its own, whose queues are full before and after.

    Args:
        name: one of `CONTESTANTS`.
        folder: the shards.
        options: what ``device``, ``batch`` and ``batches`` are taken from.
        settings: for the contestant.

    Returns:
        images per CPU-second, and per second.

    Raises:
        RuntimeError: the process failed.
    """
    command = [sys.executable, "-m", "benchmarks.data", "--turn", name, "--shards", str(folder)]
    command += ["--settings", json.dumps(settings)]
    for option in ("device", "batch", "batches"):
        command += [f"--{option}", str(getattr(options, option))]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} with {settings} ended with {done.returncode}: {done.stderr}")
    per_cpu, per_second = done.stdout.split()[-2:]
    return float(per_cpu), float(per_second)


def in_turns(entries: list[tuple[str, dict[str, Any]]], options: argparse.Namespace) -> list[dict[str, list[float]]]:
    """Measure contestants with their settings in turns, on photographs.

    Args:
        entries: as `turn` takes them.
        options: ``rounds`` and ``quick``, and what `turn` takes.

    Returns:
        of each entry, by the names of `tables.INPUT`, what each round gave.
    """
    found: list[dict[str, list[float]]] = [{measure: [] for measure in tables.INPUT} for _ in entries]
    with tempfile.TemporaryDirectory() as scratch:
        shards = build_shards(Path(scratch), 200 if options.quick else 3000)
        for _ in range(options.rounds):
            for (name, settings), values in zip(entries, found, strict=True):
                for taken, value in zip(values.values(), turn(name, shards, options, settings), strict=True):
                    taken.append(value)
    return found


def parser_of(name: str, said: str, device: str) -> argparse.ArgumentParser:
    """What benchmarks of the input are asked alike; ``said`` is a module's docstring."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=said.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device, help="where pictures are decoded "
                        "(default: the GPU where there is one)")  # fmt: skip
    parser.add_argument("--batch", type=int, help="pictures (default: {cuda} on a GPU, {cpu} on a CPU)".format(**BATCH))
    add_common(parser)
    return parser


def parse(arguments: list[str] | None, device: str) -> argparse.Namespace:
    """The options, with defaults that suit the device."""
    parser = parser_of("data", __doc__, device)
    parser.add_argument("--rounds", type=int, help="turns of each contestant (default: 7)")
    parser.add_argument("--batches", type=int, help="in a turn (default: 100 on a GPU, 15 on a CPU)")
    parser.add_argument("--threads", type=int, help="threads or workers of each (default: this machine's cores)")
    parser.add_argument("--turn", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--shards", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    gpu = options.device == "cuda"
    defaults = {"rounds": 7, "batch": BATCH[options.device], "batches": 100 if gpu else 15, "threads": cores()}
    if options.quick:
        defaults |= {"rounds": 2, "batches": 4}
    return fill_in(options, defaults)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the result."""
    options = parse(arguments, "cuda" if torch.cuda.is_available() else "cpu")
    if options.turn:
        contestant = CONTESTANTS[options.turn]
        batches = contestant(options.shards, torch.device(options.device), options.batch, **options.settings)
        measure(batches, 10, options.batch)  # buffers grow, workers start, queues fill
        say([" ".join(map(str, measure(batches, options.batches, options.batch)))])
        return
    section = Section("data", options, arguments)
    who = contestants(options.device)
    found = in_turns([(name, {"threads": options.threads}) for name in who], options)
    rows = [{"contestant": name} | values for name, values in zip(who, found, strict=True)]
    names = ("device", "rounds", "batch", "batches", "threads")
    conditions = {name: getattr(options, name) for name in names} | {"size": SIDE}
    say(tables.data(section.write(conditions, rows)))


if __name__ == "__main__":
    main()
