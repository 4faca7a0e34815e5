"""What watching a run costs: the trainer's loop with its default monitoring beside the same loop with none.

    python -m benchmarks.monitoring                          # the demo's network, 32 pictures a step, 12 intervals
    python -m benchmarks.monitoring --model lavit_tiny --size 96 --micro-batch 8 --intervals 3

Both live in one process and take turns, one optimizer step each, on the same fixed batch. Watched is a run as recipes
have it: a line of metrics every 50 steps, norms by part, phases of the step, TensorBoard. The other one never logs
and has no timer. What is compared is the CPU time of the process over an interval of 50 steps, which other programs
on the machine disturb less than a clock; pictures of attention, once an evaluation, are timed apart. Adds a table to
benchmarks/results/monitoring-DATE-MACHINE.md.
"""

import argparse
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.report import RESULTS
from benchmarks.trainer import Baton, become_rank, fixed_batch, recipe_of, start_ranks, tell, trainer_run
from data_pipeline.batch import Batch
from pretrain.deepspeed_config import resolve_deepspeed_config
from pretrain.run_folder import RunFolder
from pretrain.train import train

WATCHED, BARE = "watched", "not watched"


class Turns:
    """The same batch again and again, in place of a loader."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return self._batches

    def samples(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """As a loader gives them; asked for where the loss spikes."""
        return np.zeros(stop - start, np.int64), np.zeros(stop - start, np.int64)


def measure(local_rank: int, port: int, options: argparse.Namespace, folder: str, queue: Any) -> None:
    """One rank: both variants take turns; rank 0 sends the CPU seconds of every interval of each."""
    device, control = become_rank(local_rank, port, options.ranks)
    batch = fixed_batch(local_rank, options, device)
    recipe = recipe_of(options, compiled=False)
    interval = recipe.log_every_steps
    config = {"train_batch_size": options.ranks * options.micro_batch, "gradient_clipping": 1.0,
              "zero_optimization": {"stage": options.stage}, "bf16": {"enabled": False}}  # fmt: skip
    resolved = resolve_deepspeed_config(config, world_size=options.ranks, has_gpu=False, has_bf16_gpu=False)
    batons, watched = {WATCHED: Baton(), BARE: Baton()}, None
    for name, baton in batons.items():
        own = recipe if name == WATCHED else recipe.model_copy(update={"log_every_steps": 10**9})
        where = RunFolder(Path(folder) / name)
        where.path.mkdir(parents=True, exist_ok=True)
        (where.path / "environment.json").write_text("{}")
        (where.path / "recipe.yaml").write_text("")
        run = trainer_run(own, resolved, Turns(baton.turns(batch)), where, device=device, control=control)
        if name == BARE:
            run.meter.timer.enter = lambda _phase: None
        else:
            watched = run
        baton.start(lambda run=run: train(run))
    assert watched is not None
    seconds: dict[str, list[float]] = {name: [] for name in batons}
    for turn in range(options.intervals + 1):
        spent = dict.fromkeys(batons, 0.0)
        for _ in range(interval):
            for name, baton in batons.items():
                dist.barrier(control)
                began = time.process_time()
                baton.step()
                spent[name] += time.process_time() - began
        if turn:  # the first interval warms up
            for name, took in spent.items():
                seconds[name].append(took / interval)
    watched.monitor.keep(batch, batch.labels)
    began = time.process_time()
    watched.monitor.look(watched.metrics, 1, {"step": 1})
    watched.monitor.see(dataclasses.replace(batch))
    if local_rank == 0:
        queue.put((seconds, time.process_time() - began))
    dist.barrier(control)
    os._exit(0)  # loops and watchdogs are still there


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    """Measure, print, and add to the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="lavit_micro")
    parser.add_argument("--size", type=int, default=32, help="side of the pictures in pixels (default: 32)")
    parser.add_argument("--micro-batch", type=int, default=32, help="pictures per rank and step (default: 32)")
    parser.add_argument("--ranks", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--stage", type=int, default=1, help="ZeRO stage (default: 1)")
    parser.add_argument("--intervals", type=int, default=12, help="of 50 steps each (default: 12)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the table")
    options = parser.parse_args(arguments)
    seconds, pictures = start_ranks(measure, options)
    ratios = [mine / bare for mine, bare in zip(seconds[WATCHED], seconds[BARE], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    steps = {name: statistics.median(times) for name, times in seconds.items()}
    typed = " ".join(sys.argv[1:] if arguments is None else arguments)
    lines = [
        f"`python -m benchmarks.monitoring {typed}`:",
        f"{options.model} at {options.size} x {options.size}, {options.micro_batch} pictures a rank, {options.ranks}",
        f"rank(s) of one thread each, fp32, ZeRO stage {options.stage}; {options.intervals} intervals in turn, of 50",
        "steps; CPU time, on a machine that others used at the same time.",
        "",
        "| variant | CPU time of a step, ms | over not watched | quartiles |",
        "|---|---|---|---|",
        f"| {BARE} | {1e3 * steps[BARE]:.2f} | 1.0000 | |",
        f"| {WATCHED} | {1e3 * steps[WATCHED]:.2f} | {middle:.4f} | {low:.4f} to {high:.4f} |",
        "",
        f"Attention of 4 pictures, measured and drawn, once an evaluation: {1e3 * pictures:.0f} ms of CPU time.",
    ]
    tell("monitoring", lines, options.results)
    return seconds


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
