"""What limits the whole: training on synthetic batches, the input alone, both together; and what one would use instead.

    python -m benchmarks.end_to_end                                  # on whatever device there is
    python -m benchmarks.end_to_end --cases lavit_base:224:64 --ranks 8

All four live in the same processes and take turns of some seconds each:

- *synthetic*: `pretrain.train.train` itself, on one batch that costs nothing;
- *data only*: the real loader, reading and decoding shards of photographs; its batches are dropped;
- *both*: `pretrain.train.train` on the real loader;
- *DDP + webdataset + Pillow*: what one would use without this project. The bare loop of `benchmarks.loops` trains the
  same network with the same losses, drop path, optimizer, clipping, precision and compile setting. Its pictures come
  from the same shards with the same augmentation, size and interpolation, from as many worker processes of a torch
  DataLoader as our loader has threads; a GPU copies them from page-locked memory by itself. Nobody mixes pictures,
  saves or evaluates. Ours does more, at its own cost: the exact order of samples, checksums of pictures, metrics, a
  schedule, the watchdog, skipping of bad steps, agreement on stops. And its ZeRO stage is the one that a run takes.

Before a turn all wait until nobody computes any more: whoever had his turn has filled his queue again, and sleeps. So
every turn begins with steps that are not counted and that are more than its queue holds. On a GPU nothing should be
lost: both >= 95 % of the slower of the first two. On a CPU decoding and training share the cores, so no more than the
harmonic bound 1 / (1 / synthetic + 1 / data only) can be expected where either alone fills them. Prints a table and
writes a section of benchmarks/results/bench-DATE-MACHINE.json.
"""

import argparse
import contextlib
import math
import os
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from PIL import Image

from benchmarks import tables
from benchmarks.data import cpu_seconds, pillow_loader
from benchmarks.loops import (
    CLASSES,
    CONFIG,
    Baton,
    FixedBatch,
    Loader,
    bare_loop,
    become_rank,
    fixed_batch,
    recipe_of,
    resolve,
    start_ranks,
    trainer_run,
)
from benchmarks.photographs import SHAPE, build_shards
from benchmarks.report import Section, add_common, cores, fill_in, say
from data_pipeline.batch import Batch
from data_pipeline.dataset import Dataset
from data_pipeline.loader import TrainLoader
from models import model_config
from models.cost import count_macs
from pretrain.engine.build import build_model
from pretrain.engine.deepspeed_config import read_deepspeed_config
from pretrain.recipe import Recipe
from pretrain.run_folder import RunFolder
from pretrain.train import train

SYNTHETIC, DATA, BOTH = tables.MODES
ALTERNATIVE = tables.ALTERNATIVE
LEAST_STEPS = 4
"""Of a turn, however long they take."""
AT_REST = 0.05
"""Cores that a rank and its workers may keep busy while all loops stand still."""
REST_LIMIT_S = 10.0
AUGMENT = {"random_resized_crop": {}, "horizontal_flip": 0.5}


class PillowBatches:
    """The alternative's input as batches on the device.

    Args:
        recipe: size and interpolation of the pictures, shards, and threads, of which each becomes a worker process.
        micro_batch: pictures of a batch.
        device: where they are wanted.
    """

    def __init__(self, recipe: Recipe, micro_batch: int, device: torch.device) -> None:
        data = recipe.data
        self._loader = pillow_loader(
            Path(data.path), data.threads or 1, micro_batch, side=data.size[0],
            resampling=Image.Resampling[data.interpolation.upper()], pinned=device.type == "cuda",
        )  # fmt: skip
        self._device = device

    def __iter__(self) -> Iterator[Batch]:
        """Start the workers, each of which prepares two batches and waits; batches without end."""
        return map(self._on_device, iter(self._loader))

    def _on_device(self, pair: list[torch.Tensor]) -> Batch:
        images, labels = (part.to(self._device, non_blocking=True) for part in pair)
        rows = np.arange(len(labels))
        return Batch(images, labels, rows, rows * 0, rows, rows >= 0)


def drain(loader: Loader) -> None:
    """Take the batches and drop them."""
    for _ in loader:
        pass


def real_loader(recipe: Recipe, local_rank: int, options: argparse.Namespace, device: torch.device) -> TrainLoader:
    """The loader that the trainer would have."""
    return TrainLoader(
        Dataset.open(recipe.data.path, "train"), recipe.data, seed=0, rank=local_rank, world_size=options.ranks,
        local_ranks=options.ranks, global_batch=options.ranks * options.micro_batch, micro_batch=options.micro_batch,
        device=device,
    )  # fmt: skip


def measure(local_rank: int, port: int, options: argparse.Namespace, folder: str, queue: Any) -> None:
    """One rank: the modes take turns; rank 0 sends the result.

    That is the images per second of all ranks by mode; precision; ZeRO stage; and how many cores of a rank were busy
    before a turn, at the most.
    """
    device, control = become_rank(local_rank, port, options.ranks)
    data = {"path": str(options.shards), "augment": AUGMENT, "threads": options.threads}
    recipe = recipe_of(options, compiled=options.compile, data=data)
    # As it stands, but for the size of the batch.
    config = read_deepspeed_config(CONFIG, {"train_batch_size": options.ranks * options.micro_batch})
    resolved = resolve(recipe, config, options.ranks, device)
    batons = {mode: Baton() for mode in (*tables.MODES, ALTERNATIVE)}
    # The first, as it forks its workers, while this process has few threads.
    network = build_model(recipe_of(options, compiled=False), CLASSES).to(device)
    rival = batons[ALTERNATIVE].turns(PillowBatches(recipe, options.micro_batch, device))
    batons[ALTERNATIVE].start(
        partial(bare_loop, network, rival, precision=resolved.precision, compiled=options.compile)
    )
    loaders: dict[str, Loader] = {
        SYNTHETIC: FixedBatch(fixed_batch(local_rank, options, device)),
        DATA: real_loader(recipe, local_rank, options, device),
        BOTH: real_loader(recipe, local_rank, options, device),
    }
    for mode, loader in loaders.items():
        turns = batons[mode].turns(loader)
        if mode == DATA:
            batons[mode].start(partial(drain, turns))
            continue
        run = trainer_run(recipe, resolved, turns, RunFolder(Path(folder) / mode), device=device, control=control)
        batons[mode].start(partial(train, run))
    # Batches that are being read, being decoded, and at hand.
    queued = dict.fromkeys((DATA, BOTH), 2 * recipe.data.prefetch + 1)
    queued |= {SYNTHETIC: 1, ALTERNATIVE: 2 * options.threads + 1}
    rates, busy = take_turns(batons, queued, options, device=device, control=control)
    batons[ALTERNATIVE].end()  # and its workers
    if local_rank == 0:
        queue.put((rates, resolved.precision, resolved.stage, busy))
    dist.barrier(control)
    os._exit(0)  # loops and watchdogs are still there


def take_turns(
    batons: dict[str, Baton], queued: dict[str, int], options: argparse.Namespace, *, device: torch.device, control: Any
) -> tuple[dict[str, list[float]], float]:
    """Images per second of all ranks in every turn of each mode, and cores busy before one at the most; collective.

    Args:
        batons: of the modes.
        queued: batches that each has ready when its turn begins.
        options: how long, how often, of how many pictures.
        device: that the steps are for.
        control: group of all ranks, on CPUs.
    """

    def slowest(mode: str, steps: int) -> float:
        dist.barrier(control)
        took = torch.tensor(batons[mode].time(steps, device))
        dist.all_reduce(took, op=dist.ReduceOp.MAX, group=control)
        return took.item()

    # A queue fills up again while it is emptied, so twice what it holds.
    uncounted = {mode: 2 * queued[mode] for mode in batons}
    steps: dict[str, int] = {}
    for mode, before in uncounted.items():
        slowest(mode, before)  # builds, and compiles
        steps[mode] = max(LEAST_STEPS, math.ceil(options.seconds / (slowest(mode, before) / before)))
    rates: dict[str, list[float]] = {mode: [] for mode in batons}
    busy = 0.0
    for turn in range(options.rounds):
        for place in range(len(batons)):
            mode = [*batons][(turn + place) % len(batons)]  # each is as often the first of a turn
            busy = max(busy, come_to_rest())
            slowest(mode, uncounted[mode])
            took = slowest(mode, steps[mode])
            rates[mode].append(steps[mode] * options.ranks * options.micro_batch / took)
    most = torch.tensor(busy)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=control)
    return rates, most.item()


def come_to_rest() -> float:
    """Wait until this process and its workers sleep, for ten seconds at most; the cores that were busy at last."""
    began = time.monotonic()
    while True:
        with contextlib.suppress(psutil.NoSuchProcess):  # a worker may end meanwhile, torch.compile's for one
            before, since = cpu_seconds(), time.monotonic()
            time.sleep(0.2)
            busy = (cpu_seconds() - before) / (time.monotonic() - since)
            if busy < AT_REST or time.monotonic() - began > REST_LIMIT_S:
                return busy


def case_of(text: str) -> tuple[str, int, int]:
    """Read MODEL:SIZE:MICRO_BATCH."""
    try:
        model, size, micro_batch = text.split(":")
        return model, int(size), int(micro_batch)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not MODEL:SIZE:MICRO_BATCH, as in lavit_small:224:128") from None


def parse(arguments: list[str] | None, device: str, count: int) -> argparse.Namespace:
    """The options, with defaults that suit the device and the number of GPUs, or of cores."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", type=case_of, metavar="MODEL:SIZE:MICRO_BATCH",
                        help="default: lavit_small:224:128 and lavit_tiny:224:128; on a CPU lavit_micro:32:32, which "
                        "is about as hungry as decoding is fast, and lavit_tiny:128:8")  # fmt: skip
    parser.add_argument("--ranks", type=int, help="processes (default: one a GPU; on a CPU one a core, two at most)")
    parser.add_argument("--threads", type=int, help="that decode for each rank, and workers of the alternative's "
                        "DataLoader (default: this machine's cores, shared among the ranks)")  # fmt: skip
    parser.add_argument("--rounds", type=int, help="turns to take the median of (default: 7)")
    parser.add_argument("--seconds", type=float, help="of a turn, about (default: 5 on a GPU, 2 on a CPU)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None,
                        help="with model.compile (default: on a GPU)")  # fmt: skip
    add_common(parser)
    options = parser.parse_args(arguments)
    gpu = device == "cuda"
    defaults: dict[str, Any] = {"rounds": 7, "compile": gpu, "seconds": 5.0 if gpu else 2.0}
    defaults["ranks"] = count if gpu else min(2, count)
    defaults["cases"] = [("lavit_micro", 32, 32), ("lavit_tiny", 128, 8)]
    if gpu:
        defaults["cases"] = [("lavit_small", 224, 128), ("lavit_tiny", 224, 128)]
    if options.quick:
        defaults |= {"rounds": 2, "seconds": 1.0, "cases": defaults["cases"][:1]}
    fill_in(options, defaults)
    return fill_in(options, {"threads": max(1, cores() // options.ranks)})


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the result."""
    gpus = torch.cuda.device_count()
    options = parse(arguments, "cuda" if gpus else "cpu", gpus or cores())
    section = Section("end_to_end", options, arguments)
    rows: list[dict[str, Any]] = []
    busiest = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        options.shards = build_shards(Path(scratch), 300 if options.quick else 3000)
        for model, size, micro_batch in options.cases:
            case = {"model": model, "size": size, "micro_batch": micro_batch}
            rates, precision, stage, busy = start_ranks(measure, argparse.Namespace(**(vars(options) | case)))
            busiest = max(busiest, busy)
            case |= {
                "precision": precision,
                "zero_stage": stage,
                "macs": count_macs(model_config(model, image_size=size)),
            }
            rows += [case | {"mode": mode, "images_per_s": values} for mode, values in rates.items()]
    conditions = {name: getattr(options, name) for name in ("ranks", "threads", "rounds", "seconds", "compile")}
    conditions |= {
        "photographs": f"{SHAPE[1]} x {SHAPE[0]} pixels",
        "cores_busy_before_a_turn": f"at most {busiest:.2f}",
    }
    say(tables.end_to_end(section.write(conditions, rows)))


if __name__ == "__main__":
    main()
