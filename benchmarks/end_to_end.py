"""Throughput of the whole: training on a fixed batch, the input alone, both together, and DDP + webdataset + Pillow.

All four are in the same processes and take turns of some seconds. The first and the third are ``pretrain.trainer``'s
loop; the last is the bare loop of ``benchmarks.trainer`` on a torch DataLoader with as many workers as our loader has
threads. Each turn begins with steps that do not count, more than its queue holds. On a CPU decoding and training share
the cores: the harmonic bound 1 / (1 / synthetic + 1 / data only) limits both together.
"""

import argparse
import os
import tempfile
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from benchmarks import timing
from benchmarks.data import PHOTOGRAPH, build_shards, pillow_loader
from benchmarks.trainer import CLASSES, Stepper, bare_loop, build, fixed_batches, join, recipe_of, start_ranks
from data_pipeline.batch import Batch
from pretrain.engine.engine import build_model
from pretrain.recipe import Recipe

MODES = ("synthetic", "data only", "both", "DDP + webdataset + Pillow")


def pillow_batches(recipe: Recipe, micro_batch: int, device: torch.device) -> Iterator[Batch]:
    """Batches of torch's DataLoader on the device."""
    data, pinned = recipe.data, device.type == "cuda"
    resampling = Image.Resampling[data.interpolation.upper()]
    loader = pillow_loader(
        Path(data.path), data.threads or 1, micro_batch, side=data.size[0], resampling=resampling, pinned=pinned
    )
    for pair in loader:
        images, labels = (part.to(device, non_blocking=True) for part in pair)
        rows = np.arange(len(labels))
        yield Batch(images, labels, rows, rows * 0, rows, rows >= 0)


def measure(rank: int, port: int, options: argparse.Namespace, folder: Path, queue: Any) -> None:
    """On one rank: let the four take turns; rank 0 sends images per second of all ranks, by mode."""
    device, control = join(rank, port, options.ranks)
    augment = {"random_resized_crop": {}, "horizontal_flip": 0.5}
    recipe = recipe_of(options, compiled=options.compile, augment=augment, threads=options.threads)
    global_batch = options.ranks * options.micro_batch
    # The DataLoader first: it forks its workers while there are few threads.
    steppers = {MODES[3]: Stepper(pillow_batches(recipe, options.micro_batch, device))}
    model = build_model(recipe, CLASSES).to(device)
    loop = partial(bare_loop, autocast=options.autocast, compiled=options.compile)
    steppers[MODES[3]].start(partial(loop, model, steppers[MODES[3]]))
    for mode in MODES[:3]:
        trainer = build(recipe, {"train_batch_size": global_batch}, folder / mode, device, control)
        batches = fixed_batches(rank, options, device) if mode == "synthetic" else trainer.train_loader
        trainer.train_loader = steppers[mode] = Stepper(batches)
        steppers[mode].start(partial(deque, steppers[mode], 0) if mode == "data only" else trainer.train)
    queued = 4 * max(recipe.data.prefetch, options.threads) + 2

    def slowest(mode: str, steps: int) -> float:
        dist.barrier(control)
        took = torch.tensor(steppers[mode].seconds(steps, device))
        dist.all_reduce(took, op=dist.ReduceOp.MAX, group=control)
        return took.item()

    steps = {mode: max(4, round(options.seconds * queued / slowest(mode, queued))) for mode in MODES}
    rates: dict[str, list[float]] = {mode: [] for mode in MODES}
    for mode, counts in timing.turns(MODES, options.rounds):
        slowest(mode, queued)
        rate = steps[mode] * global_batch / slowest(mode, steps[mode])
        if counts:
            rates[mode].append(rate)
    if rank == 0:
        queue.put((rates, trainer.engine.zero_optimization_stage()))
    dist.barrier(control)
    os._exit(0)  # loops and watchdogs are still running


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the result."""
    gpus = torch.cuda.device_count()
    cases = ["lavit_small:224:128", "lavit_tiny:224:128"] if gpus else ["lavit_micro:32:32", "lavit_tiny:128:8"]
    ranks = gpus or min(2, timing.cores())
    defaults = {
        "cases": cases, "ranks": ranks, "threads": max(1, timing.cores() // ranks), "rounds": 7,
        "seconds": 5.0 if gpus else 2.0, "compile": bool(gpus), "autocast": bool(gpus),
    }  # fmt: skip
    quick = {"rounds": 1, "seconds": 0.5, "cases": cases[:1]}
    options = timing.parse("end_to_end", __doc__, arguments, defaults=defaults, quick=quick)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        options.shards = build_shards(Path(scratch), 300 if options.quick else 3000)
        for case in options.cases:  # MODEL:SIZE:MICRO_BATCH
            options.model, size, micro_batch = case.split(":")
            options.size, options.micro_batch = int(size), int(micro_batch)
            rates, stage = start_ranks(measure, options)
            bounds = [1 / (1 / a + 1 / b) for a, b in zip(rates["synthetic"], rates["data only"], strict=True)]
            facts = {"case": case, "zero_stage": stage}
            rows += [
                facts | {"mode": mode, "images_per_s": values, "both_over": timing.ratio(rates["both"], values)}
                for mode, values in (rates | {"harmonic bound": bounds}).items()
            ]
    names = ("ranks", "threads", "rounds", "seconds", "compile", "autocast")
    conditions = {name: getattr(options, name) for name in names} | {
        "photographs": "{} x {} pixels".format(*PHOTOGRAPH)
    }
    timing.write(options, conditions, rows)


if __name__ == "__main__":
    main()
