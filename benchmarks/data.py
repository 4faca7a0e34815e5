"""Training input: images per CPU-second of our loader, DALI's own reader, and webdataset + Pillow.

Each reads the same shards and does the same: random resized crop to 224 pixels, flip, normalize. They take turns, each
turn in a fresh process. All threads and worker processes count, so that the result depends little on how busy the
machine is otherwise. On a GPU our loader also runs with the hardware decoder's default share. "Decoding only" is the
limit of DALI: the same crops of JPEGs that are in memory, decoded and nothing else.

`python_us` is the CPU time per image of the Python threads in the process that trains. `gil_us` is its part with the
GIL held: without what they spend inside the calls of `GIL_FREE`, which a profiling hook times in a second pass. Both
are upper bounds: numpy also releases the GIL for long arrays. Threads that resize are left out: a GPU needs none.
"""

import argparse
import contextlib
import io
import itertools
import multiprocessing
import os
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import webdataset
from nvidia.dali import Pipeline, fn, types
from PIL import Image
from sklearn.datasets import load_sample_images

from benchmarks import timing
from data_pipeline import graph
from data_pipeline.build import main as build
from data_pipeline.dataset import Dataset
from data_pipeline.draws import Draws, random_resized_crop
from data_pipeline.loader import TrainLoader
from data_pipeline.reader import Reader
from data_pipeline.transforms import IMAGENET_MEAN, IMAGENET_STD, AugmentConfig, InputConfig, RandomResizedCropConfig
from pretrain.devices import use_gpu

SIDE = 224
PHOTOGRAPH = (500, 375)
"""Width and height of the images in the shards, in pixels."""
MEASURED = ("images_per_cpu_s", "images_per_s", "python_us", "gil_us")
GIL_FREE = (os.pread, os.preadv, os.posix_fadvise, os.dup, os.open, os.close, zlib.crc32)
_MEAN, _STD = torch.tensor(IMAGENET_MEAN)[:, None, None], torch.tensor(IMAGENET_STD)[:, None, None]


def build_shards(folder: Path, count: int, sizes: Sequence[tuple[int, int]] = (PHOTOGRAPH,)) -> Path:
    """Build a dataset of photographs cut from scikit-learn's two and resized, alike in both splits; its folder.

    Their sizes, width and height in pixels, are taken in turn.
    """
    rng = np.random.default_rng(0)
    images = [Image.fromarray(array) for array in load_sample_images().images]
    for number in range(count):
        image, width = images[number % 2], int(rng.integers(320, 600))
        height = width * 3 // 4
        left, top = int(rng.integers(0, image.width - width)), int(rng.integers(0, max(1, image.height - height)))
        place = folder / f"photos/class{number % 10}"
        place.mkdir(parents=True, exist_ok=True)
        box = (left, top, left + width, min(top + height, image.height))
        resized = image.crop(box).resize(sizes[number % len(sizes)], Image.Resampling.LANCZOS)
        resized.save(place / f"{number}.jpg", quality=92)
    for split in ("train", "val"):
        with contextlib.redirect_stderr(io.StringIO()) as printed:
            if build([str(folder / "photos"), str(folder / "shards"), "--split", split]):
                raise RuntimeError(f"shards of photographs could not be built: {printed.getvalue()}")
    return folder / "shards"


def ours(folder: Path, device: torch.device, batch: int, **settings: Any) -> Iterator[torch.Tensor]:
    """Batches of our loader, with settings of its ``InputConfig``."""
    augment = AugmentConfig(random_resized_crop=RandomResizedCropConfig(), horizontal_flip=0.5)
    config = InputConfig(path=folder, **{"interpolation": "bilinear", "augment": augment, **settings})
    dataset = Dataset.open(folder, "train")
    place = {"global_batch": batch, "micro_batch": batch, "rank": 0, "world_size": 1, "device": device}
    with contextlib.closing(TrainLoader(dataset, config, seed=0, **place)) as loader:
        for ready in loader:
            yield ready.images


def native(folder: Path, device: torch.device, batch: int, *, threads: int) -> Iterator[torch.Tensor]:
    """Batches of DALI's own webdataset reader and its own random operators."""
    shards = sorted(folder.glob("*-train-*.tar"))
    gpu = device.type == "cuda"
    pipe = Pipeline(batch, threads, 0 if gpu else None)
    with pipe:
        jpeg, _ = fn.readers.webdataset(
            paths=[str(path) for path in shards], index_paths=[str(path.with_suffix(".idx")) for path in shards],
            ext=["jpg", "cls"], random_shuffle=True, initial_fill=512, missing_component_behavior="error",
        )  # fmt: skip
        images = fn.decoders.image_random_crop(jpeg, device="mixed" if gpu else "cpu", random_area=(0.08, 1.0))
        images = fn.resize(images, size=(SIDE, SIDE), interp_type=types.INTERP_LINEAR, antialias=True)
        mean, std = ([255 * value for value in values] for values in (IMAGENET_MEAN, IMAGENET_STD))
        flip = {"mirror": fn.random.coin_flip(), "output_layout": "CHW"}
        pipe.set_outputs(fn.crop_mirror_normalize(images, dtype=types.FLOAT, mean=mean, std=std, **flip))
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


def pillow(
    folder: Path,
    device: torch.device,
    batch: int,
    *,
    threads: int,
    side: int = SIDE,
    resampling: Image.Resampling = Image.Resampling.BILINEAR,
) -> Iterator[list[torch.Tensor]]:
    """Batches of a torch DataLoader with webdataset and Pillow in its workers; pinned for a GPU, as one would.

    Every rank and worker draws shards of its own. Yields images (batch, 3, side, side) float32, normalized, and labels
    (batch,) int64, without end.
    """
    shards, gpu = sorted(str(path) for path in folder.glob("*-train-*.tar")), device.type == "cuda"
    read = webdataset.WebDataset(
        shards, resampled=True, shardshuffle=False, nodesplitter=webdataset.split_by_node
    ).shuffle(512)
    augmented = partial(_augmented, side=side, resampling=resampling)
    samples = read.to_tuple("jpg", "cls").map_tuple(augmented, int)
    for pair in torch.utils.data.DataLoader(samples, batch_size=batch, num_workers=threads, pin_memory=gpu):
        yield [part.to(device, non_blocking=gpu) for part in pair]


def decoding(folder: Path, device: torch.device, batch: int, *, threads: int) -> Iterator[Any]:
    """Batches that DALI only decodes, from JPEGs in memory."""
    dataset, given = Dataset.open(folder, "train"), []
    reader = Reader(dataset)
    for ids in np.split(np.arange(8 * batch) % len(dataset), 8):
        sizes = [sides[ids].astype(np.int64) for sides in (dataset.width, dataset.height)]
        crop = random_resized_crop(RandomResizedCropConfig(), Draws(0, np.zeros_like(ids), ids), *sizes)
        jpegs = [reader.read(sample)[0] for sample in ids.tolist()]
        given.append([graph.in_place(values) for values in (jpegs, crop["start"], crop["shape"])])
    source, gpu = itertools.cycle(given), device.type == "cuda"
    pipe = Pipeline(batch, threads, 0 if gpu else None)
    with pipe:
        jpeg, start, shape = fn.external_source(lambda: next(source), num_outputs=3, no_copy=True)
        where = {"device": "mixed" if gpu else "cpu", "start": start, "shape": shape, "axes": [0, 1]}
        pipe.set_outputs(fn.decoders.image_slice(jpeg, **where))
    while True:
        yield pipe.run()


def cpu_seconds() -> float:
    """Processor time of this process and its living children."""
    process = psutil.Process()
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def python_seconds() -> float:
    """CPU time of this process's living Python threads, without those that resize."""
    threads = [one.native_id for one in threading.enumerate() if not one.name.startswith(("data-resize", "Dummy"))]
    return sum(int(Path(f"/proc/self/task/{one}/schedstat").read_text().split()[0]) for one in threads) / 1e9


def measure(batches: Iterator[Any], count: int, batch: int) -> tuple[float, float, float]:
    """Images per CPU-second and per second over ``count`` batches, and microseconds of Python's threads per image."""
    cpu, clock, python = cpu_seconds(), time.perf_counter(), python_seconds()
    for _ in itertools.islice(batches, count):
        pass
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    python, clock, cpu = python_seconds() - python, time.perf_counter() - clock, cpu_seconds() - cpu
    return count * batch / cpu, count * batch / clock, python / (count * batch) * 1e6


CONTESTANTS: dict[str, Callable[..., Iterator[Any]]] = {
    "ours": ours,
    "ours, hardware decoder": partial(ours, hw_decoder_load=0.65),  # DALI's default
    "DALI's own reader": native,
    "webdataset + Pillow": pillow,
    "decoding only": decoding,
}


def turn(name: str, shards: Path, options: argparse.Namespace) -> tuple[float, ...]:
    """``measure`` one contestant, and microseconds with the GIL per image; called in a fresh process."""
    found, spent, began = [], [], threading.local()

    def hook(_frame: object, event: str, function: object) -> None:
        if event == "c_call" and function in GIL_FREE:
            began.at = time.thread_time()
        elif event == "c_return" and function in GIL_FREE:
            spent.append(time.thread_time() - began.at)

    for profile in (None, hook):
        threading.setprofile(profile)
        sys.setprofile(profile)
        batches = CONTESTANTS[name](shards, torch.device(options.device), options.batch, threads=options.threads)
        measure(batches, 10, options.batch)  # buffers grow, workers start, queues fill
        spent.clear()
        found.append(measure(batches, options.batches, options.batch))
        batches.close()
    return *found[0], found[0][2] - sum(spent) / (options.batches * options.batch) * 1e6


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the result."""
    gpu = use_gpu()
    defaults = {
        "device": "cuda" if gpu else "cpu", "batch": 256 if gpu else 64, "batches": 100 if gpu else 15, "rounds": 7,
        "threads": timing.cores(),
    }  # fmt: skip
    options = timing.parse("data", __doc__, arguments, defaults=defaults, quick={"rounds": 1, "batches": 4})
    names = [name for name in CONTESTANTS if options.device == "cuda" or "hardware" not in name]
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        shards = build_shards(Path(scratch), 200 if options.quick else 3000)
        for name, _ in timing.turns(names, options.rounds, warmup=0):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
                found[name].append(fresh.submit(turn, name, shards, options).result())
    raw = {name: dict(zip(MEASURED, map(list, zip(*found[name], strict=True)), strict=True)) for name in names}
    ours_over = {name: timing.ratio(raw["ours"][MEASURED[0]], raw[name][MEASURED[0]]) for name in names}
    rows = [{"contestant": name, **raw[name], "ours_per_cpu_s_over": ours_over[name]} for name in names]
    conditions = {name: getattr(options, name) for name in ("device", "rounds", "batch", "batches", "threads")}
    timing.write(options, conditions | {"size": SIDE}, rows)


if __name__ == "__main__":
    main()
