"""What the training input costs: our loader against webdataset + Pillow and against DALI's own reader.

    python -m benchmarks.data                 # on the CPU; prints a table
    python -m benchmarks.data --device cuda   # decode on the GPU

Each contestant reads the same shards and does the same: random resized crop to 224, flip, normalise. They take turns,
each turn in a fresh process, and the medians over the rounds are compared. The measure is images per CPU-second: all
threads and worker processes are counted, so that it does not depend much on how busy the machine is otherwise.
"""

import argparse
import io
import itertools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil
import torch
import webdataset
from nvidia.dali import Pipeline, fn, types
from nvidia.dali import __version__ as dali_version
from PIL import Image
from rich.console import Console
from sklearn.datasets import load_sample_images

from data_pipeline.build import main as build
from data_pipeline.dataset import Dataset
from data_pipeline.loader import TrainLoader
from data_pipeline.transforms import IMAGENET_MEAN, IMAGENET_STD, AugmentConfig, InputConfig, RandomResizedCropConfig

SIDE = 224
BATCH = 64
_MEAN, _STD = torch.tensor(IMAGENET_MEAN)[:, None, None], torch.tensor(IMAGENET_STD)[:, None, None]


def make_photos(folder: Path, count: int) -> None:
    """Write photographs of 500 x 375 pixels, cut from scikit-learn's two and enlarged as they need."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(array) for array in load_sample_images().images]
    for number in range(count):
        image = images[number % 2]
        width = int(rng.integers(320, 600))
        height = width * 3 // 4
        left, top = rng.integers(0, image.width - width), rng.integers(0, max(1, image.height - height))
        label = folder / f"class{number % 10}"
        label.mkdir(parents=True, exist_ok=True)
        box = (int(left), int(top), int(left) + width, min(int(top) + height, image.height))
        image.crop(box).resize((500, 375), Image.Resampling.LANCZOS).save(label / f"{number}.jpg", quality=92)


def ours(folder: Path, device: torch.device, threads: int) -> Iterator[torch.Tensor]:
    """Yield batches of our loader."""
    augment = AugmentConfig(random_resized_crop=RandomResizedCropConfig(), horizontal_flip=0.5)
    config = InputConfig(path=folder, interpolation="bilinear", augment=augment, threads=threads)
    loader = TrainLoader(
        Dataset.open(folder, "train"),
        config,
        seed=0,
        global_batch=BATCH,
        micro_batch=BATCH,
        rank=0,
        world_size=1,
        device=device,
    )
    for batch in loader:
        yield batch.images


def native(folder: Path, device: torch.device, threads: int) -> Iterator[torch.Tensor]:
    """Yield batches of DALI's own webdataset reader and its own random operators."""
    shards = sorted(folder.glob("*.tar"))
    gpu = device.type == "cuda"
    pipe = Pipeline(BATCH, threads, 0 if gpu else None)
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


def _augmented(jpeg: bytes) -> torch.Tensor:
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
    image = image.crop(box).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # As torchvision's ToTensor: made contiguous while it is a quarter of the size.
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
    return pixels.sub_(_MEAN).div_(_STD)


def pillow(folder: Path, device: torch.device, threads: int) -> Iterator[torch.Tensor]:
    """Yield batches of webdataset with Pillow in the workers of a torch DataLoader."""
    shards = sorted(str(path) for path in folder.glob("*.tar"))
    read = webdataset.WebDataset(shards, resampled=True, shardshuffle=False).shuffle(512)
    loader = torch.utils.data.DataLoader(
        read.to_tuple("jpg", "cls").map_tuple(_augmented, int), batch_size=BATCH, num_workers=threads
    )
    for images, _ in loader:
        yield images.to(device)


def cpu_seconds() -> float:
    """Return the processor time of this process and of its children that live."""
    process = psutil.Process()
    times = [p.cpu_times() for p in (process, *process.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def measure(batches: Iterator[torch.Tensor], count: int) -> tuple[float, float]:
    """Return images per CPU-second and per second of the clock over `count` batches."""
    cpu, clock = cpu_seconds(), time.perf_counter()
    for images in itertools.islice(batches, count):
        last = images
    if last.is_cuda:
        torch.cuda.synchronize()
    return count * BATCH / (cpu_seconds() - cpu), count * BATCH / (time.perf_counter() - clock)


CONTESTANTS: dict[str, Callable[[Path, torch.device, int], Iterator[torch.Tensor]]] = {
    "ours": ours,
    "DALI's own reader": native,
    "webdataset + Pillow": pillow,
}


def turn(name: str, folder: Path, args: argparse.Namespace) -> tuple[float, float]:
    """Measure a contestant in a process of its own, whose queues are full before and after."""
    command = [sys.executable, "-m", "benchmarks.data", "--turn", name, "--shards", str(folder)]
    command += ["--device", args.device, "--batches", str(args.batches), "--threads", str(args.threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    per_cpu, per_second = done.stdout.split()[-2:]
    return float(per_cpu), float(per_second)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser("python -m benchmarks.data", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contestant")
    parser.add_argument("--batches", type=int, default=30, help=f"batches of {BATCH} in a turn")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads or workers of each")
    parser.add_argument("--turn", help=argparse.SUPPRESS)
    parser.add_argument("--shards", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    console = Console(soft_wrap=True)
    if args.turn:
        batches = CONTESTANTS[args.turn](args.shards, torch.device(args.device), args.threads)
        measure(batches, 10)  # buffers grow, workers start, queues fill
        console.print(*measure(batches, args.batches))
        return
    with tempfile.TemporaryDirectory() as scratch:
        make_photos(Path(scratch, "photos"), 3000)
        build([f"{scratch}/photos", f"{scratch}/shards"])
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTESTANTS}
        for _ in range(args.rounds):
            for name, values in found.items():
                values.append(turn(name, Path(scratch, "shards"), args))
    console.print(
        f"{datetime.now(UTC):%Y-%m-%d}, {len(os.sched_getaffinity(0))} cores, {platform.machine()}, {args.threads} "
        f"threads, DALI {dali_version}, torch {torch.__version__}, {args.device}; "
        f"medians of {args.rounds} interleaved turns of {args.batches * BATCH} images"
    )
    console.print("| | images per CPU-second (lowest - highest) | images/s | ours does more per CPU-second by |")
    console.print("|---|---|---|---|")
    for name, values in found.items():
        per_cpu = [value for value, _ in values]
        ratio = statistics.median(a / b for (a, _), (b, _) in zip(found["ours"], values, strict=True))
        clock = statistics.median(value for _, value in values)
        spread = f"{min(per_cpu):.0f} - {max(per_cpu):.0f}"
        console.print(f"| {name} | {statistics.median(per_cpu):.0f} ({spread}) | {clock:.0f} | {ratio:.2f}x |")


if __name__ == "__main__":
    main()
