"""What a checkpoint costs training: how long the loop waits for it, and how much slower steps are while it is written.

    python -m benchmarks.checkpoint                          # lavit_tiny at 96 pixels, 2 ranks, stage 1
    python -m benchmarks.checkpoint --ranks 8 --size 224 --micro-batch 64 --model lavit_base

In every round the same processes take some steps in peace, begin a checkpoint, and go on taking steps until it is
on disk. The round's wait is what the loop stands still for; what its other steps took longer than the peaceful ones'
median is the slowdown. Both are set against --every-steps steps, the distance between checkpoints. Prints a
table and adds it to benchmarks/results/checkpoint-DATE-MACHINE.md.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.loops import (
    CONFIG,
    FixedBatch,
    become_rank,
    fixed_batch,
    recipe_of,
    resolve,
    start_ranks,
    trainer_run,
)
from benchmarks.report import RESULTS, tell
from pretrain.engine.deepspeed_config import read_deepspeed_config
from pretrain.run_folder import RunFolder
from pretrain.train import train_step


def measure(local_rank: int, port: int, options: argparse.Namespace, folder: str, queue: Any) -> None:
    """One rank; rank 0 sends (bytes on disk, rounds of (wait, slowdown, peaceful step, steps while writing))."""
    device, control = become_rank(local_rank, port, options.ranks)
    loader = FixedBatch(fixed_batch(local_rank, options, device))
    batches = iter(loader)
    changes = {
        "train_batch_size": options.ranks * options.micro_batch,
        "zero_optimization": {"stage": options.stage},
        "bf16": {"enabled": False},
    }
    recipe = recipe_of(options, compiled=False)
    resolved = resolve(recipe, read_deepspeed_config(CONFIG, changes), options.ranks, device)
    where = RunFolder(Path(folder))
    run = trainer_run(recipe, resolved, loader, where, device=device, control=control)

    def step() -> float:
        dist.barrier(control)
        began = time.perf_counter()
        train_step(run, batches)
        if device.type == "cuda":
            torch.cuda.synchronize()
        run.progress.step += 1
        run.progress.samples_seen += run.batch.global_batch
        return time.perf_counter() - began

    rounds = []
    for turn in range(options.rounds + 1):
        peace = statistics.median(step() for _ in range(options.steps))
        began = time.perf_counter()
        run.save()
        wait = time.perf_counter() - began
        busy = torch.ones(1)
        disturbed = []
        while busy.item():
            disturbed.append(step())
            busy.fill_(run.writer.writing)
            dist.all_reduce(busy, op=dist.ReduceOp.MAX, group=control)
        run.settle_save()
        assert run.saved_at == run.save_tried_at, "the checkpoint could not be written"
        if turn:  # the first allocates and warms up
            rounds.append((wait, sum(disturbed) - len(disturbed) * peace, peace, len(disturbed)))
    if local_rank == 0:
        newest = max(where.checkpoints.glob("step-*"))
        queue.put((sum(file.stat().st_size for file in newest.iterdir()), rounds))
    dist.barrier(control)
    os._exit(0)  # the watchdog is still there


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and add to the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="lavit_tiny")
    parser.add_argument("--size", type=int, default=96, help="side of the pictures in pixels (default: 96)")
    parser.add_argument("--micro-batch", type=int, default=8, help="pictures per rank and step (default: 8)")
    parser.add_argument("--ranks", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--stage", type=int, default=1, help="ZeRO stage (default: 1)")
    parser.add_argument("--rounds", type=int, default=7, help="checkpoints to take the median of (default: 7)")
    parser.add_argument("--steps", type=int, default=5, help="peaceful steps before each (default: 5)")
    parser.add_argument("--every-steps", type=int, default=1000, help="distance of checkpoints (default: 1000)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the table")
    options = parser.parse_args(arguments)
    size, rounds = start_ranks(measure, options)
    waits, slower, peace, during = ([one[i] for one in rounds] for i in range(4))
    interval = options.every_steps * statistics.median(peace)

    def row(what: str, seconds: list[float]) -> str:
        low, middle, high = statistics.quantiles(seconds, n=4)
        return (
            f"| {what} | {1e3 * middle:.1f} | {1e3 * low:.1f} to {1e3 * high:.1f} | {100 * middle / interval:.3f} % |"
        )

    text = (
        f"`python -m benchmarks.checkpoint {' '.join(sys.argv[1:] if arguments is None else arguments)}`: "
        f"{options.model}, {size / 2**20:.0f} MiB on disk, {options.ranks} ranks, ZeRO stage {options.stage}, "
        f"{options.rounds} checkpoints, each written during {statistics.median(during):.0f} steps of "
        f"{1e3 * statistics.median(peace):.0f} ms; the last column is for one in {options.every_steps} steps."
    )
    lines = [
        text,
        "",
        "| of one checkpoint | ms | quartiles | of the time between two |",
        "|---|---|---|---|",
        row("the loop waits", waits),
        row("steps are slower while it is written", slower),
    ]
    tell("checkpoint", lines, options.results)


if __name__ == "__main__":
    main()
