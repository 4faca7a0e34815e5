"""What watching a run costs: the trainer's loop with its default monitoring beside the same loop with none.

    python -m benchmarks.monitoring                          # the demo's network, 32 pictures a step, 12 intervals
    python -m benchmarks.monitoring --model lavit_tiny --size 96 --micro-batch 8 --intervals 3

Both live in one process and take turns, one optimizer step each, on the same fixed batch. Watched is a run as recipes
have it: a line of metrics every 50 steps, norms by part, phases of the step, TensorBoard. The other one never logs and
has no timer; it is there twice, and what lies between the two is the error of the measurement. Compared is the CPU time
of the process, which other programs on the machine disturb less than a clock: the median of the steps between two lines
of metrics, and of those with one, which weigh a fiftieth. What the error hides is seen from within: the CPU time spent
in the monitoring's own calls, as a share of all that the watched run spent. Pictures of attention, once an evaluation,
are timed apart. Adds a table to benchmarks/results/monitoring-DATE-MACHINE.md.
"""

import argparse
import dataclasses
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.loops import (
    Baton,
    FixedBatch,
    become_rank,
    fixed_batch,
    recipe_of,
    resolve,
    start_ranks,
    trainer_run,
)
from benchmarks.report import RESULTS, tell
from pretrain.monitoring.norms import PartNorms
from pretrain.run_folder import RunFolder
from pretrain.train import train

WATCHED, BARE, AGAIN = "watched", "not watched", "not watched, again"


class Account:
    """CPU seconds spent in some methods; calls within calls count once."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    def watch(self, holder: Any, name: str) -> None:
        """Count a method of an object, or of a class."""
        original = getattr(holder, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            began, self._depth = time.process_time(), self._depth + 1
            try:
                return original(*arguments, **named)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.process_time() - began

        setattr(holder, name, counted)


def measure(local_rank: int, port: int, options: argparse.Namespace, folder: str, queue: Any) -> None:
    """One rank: the variants take turns; rank 0 sends the CPU seconds of every step of each."""
    device, control = become_rank(local_rank, port, options.ranks)
    batch = fixed_batch(local_rank, options, device)
    recipe = recipe_of(options, compiled=False)
    interval = recipe.log_every_steps
    config = {"train_batch_size": options.ranks * options.micro_batch, "gradient_clipping": 1.0,
              "zero_optimization": {"stage": options.stage}, "bf16": {"enabled": False}}  # fmt: skip
    resolved = resolve(recipe, config, options.ranks, device)
    account = Account()
    account.watch(PartNorms, "_look")
    batons, watched = {BARE: Baton(), AGAIN: Baton(), WATCHED: Baton()}, None
    for name, baton in batons.items():
        own = recipe if name == WATCHED else recipe.model_copy(update={"log_every_steps": 10**9})
        turns, where = baton.turns(FixedBatch(batch)), RunFolder(Path(folder) / name)
        run = trainer_run(own, resolved, turns, where, device=device, control=control)
        if name != WATCHED:
            run.meter.timer.enter = lambda _phase: None
        else:
            watched = run
            for holder, method in ((run, "log"), (run.meter.timer, "enter"), (run.monitor, "see")):
                account.watch(holder, method)
        baton.start(lambda run=run: train(run))
    assert watched is not None
    seconds: dict[str, list[float]] = {name: [] for name in batons}
    for turn in range(interval * (options.intervals + 1)):
        for place in range(len(batons)):
            name = [*batons][(turn + place) % len(batons)]  # each is as often the first of a turn
            dist.barrier(control)
            began = time.process_time()
            batons[name].step()
            seconds[name].append(time.process_time() - began)
    spent = account.seconds / sum(seconds[WATCHED])
    watched.monitor.keep(batch, batch.labels)
    began = time.process_time()
    watched.monitor.look(watched.metrics, 1, {"step": 1})
    watched.monitor.see(dataclasses.replace(batch))
    if local_rank == 0:
        queue.put(
            ({name: times[interval:] for name, times in seconds.items()}, interval, spent, time.process_time() - began)
        )
    dist.barrier(control)
    os._exit(0)  # loops and watchdogs are still there


def main(arguments: list[str] | None = None) -> None:
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
    load = os.getloadavg()[0]
    seconds, interval, spent, pictures = start_ranks(measure, options)
    usual, written = ({} for _ in range(2))
    for name, times in seconds.items():
        usual[name] = statistics.median(time for turn, time in enumerate(times) if (turn + 1) % interval)
        written[name] = statistics.median(times[interval - 1 :: interval])
    whole = {name: usual[name] + (written[name] - usual[name]) / interval for name in seconds}
    typed = " ".join(sys.argv[1:] if arguments is None else arguments)
    lines = [
        f"`python -m benchmarks.monitoring {typed}`:",
        f"{options.model} at {options.size} x {options.size}, {options.micro_batch} pictures a rank, {options.ranks}",
        f"rank(s) of one thread each, fp32, ZeRO stage {options.stage}; {options.intervals} interleaved intervals of",
        f"50 steps; CPU time; load average {load:.1f} before it.",
        "",
        "| variant | step, ms | step with a line of metrics, ms | together, over not watched |",
        "|---|---|---|---|",
        *(
            f"| {name} | {1e3 * usual[name]:.2f} | {1e3 * written[name]:.2f} | {whole[name] / whole[BARE]:.4f} |"
            for name in seconds
        ),
        "",
        f"Share of the watched run's CPU time that its monitoring spent in its own calls: {spent:.2%}.",
        f"Attention of 4 pictures, measured and drawn, once an evaluation: {1e3 * pictures:.0f} ms of CPU time.",
    ]
    tell("monitoring", lines, options.results)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
