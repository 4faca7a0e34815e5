"""What the trainer costs: its whole loop at every ZeRO stage beside a bare torch DDP loop of the same model.

    python -m benchmarks.trainer                                 # on whatever device there is
    python -m benchmarks.trainer --ranks 8 --stages 0 1 --micro-batch 64 --no-compile

All variants live in the same processes and take turns on the same fixed batches, so that whatever else the machine does
hits all; before a turn the ranks meet, and then its steps are timed. On a CPU all of it begins anew in fresh processes,
since from one process to the next a ratio differs by more than the turns in one of them tell. The trainer's side is
`pretrain.train.train` itself, but for the loader: that gives the same tensors again and again. What it does between two
steps is timed with them; of its lines of metrics, one every 50 steps, each turn on a GPU has one, being 50 steps long.
On a CPU, where a process takes some ten steps, there is none (docs/watching.md says what they cost). Neither saves nor
evaluates.

Compiled stages are set against a bare loop that is compiled, too, and those with weights in bf16, the default on a GPU,
against one with weights in bf16. Both sides then keep fp32 masters for AdamW, and send gradients in bf16. In the bare
loop every rank has all masters and moments, and steps them all; at ZeRO stage 1 DeepSpeed divides them among the ranks,
each of which steps its part and gathers the weights of the others. Prints a table and writes a section of
benchmarks/results/bench-DATE-MACHINE.json.
"""

import argparse
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import tables
from benchmarks.loops import (
    CLASSES,
    CONFIG,
    Baton,
    FixedBatch,
    bare_loop,
    become_rank,
    fixed_batch,
    recipe_of,
    resolve,
    start_ranks,
    trainer_run,
)
from benchmarks.report import Section, add_common, cores, fill_in, say
from pretrain.engine.build import build_model
from pretrain.engine.precision import Precision
from pretrain.recipe import Recipe
from pretrain.run_folder import RunFolder
from pretrain.train import train

BARE = tables.BARE
LOG_EVERY_STEPS: int = Recipe.model_fields["log_every_steps"].default


def contestants(options: argparse.Namespace) -> list[tuple[str, Precision, int | None]]:
    """Mode, precision and ZeRO stage of each; None is the bare loop, which comes before those compared with it."""
    stages: dict[Precision, list[int]] = {"bf16 autocast" if options.autocast else "fp32": options.stages}
    if options.bf16_stages:
        stages["bf16"] = options.bf16_stages
    return [
        (mode, precision, stage)
        for mode in (("eager", "compiled") if options.compile else ("eager",))
        for precision, numbers in stages.items()
        for stage in (None, *numbers)
        if not (mode == "compiled" and stage == 3)  # which the trainer refuses
    ]


def config_of(options: argparse.Namespace, precision: Precision, stage: int) -> dict[str, Any]:
    """ds_config.json but for the stage and the precision, which are the contestant's."""
    return {
        "train_batch_size": options.ranks * options.micro_batch,
        "gradient_clipping": 1.0,
        "zero_optimization": {**json.loads(CONFIG.read_text())["zero_optimization"], "stage": stage},
        "torch_autocast": {"enabled": precision == "bf16 autocast"},
        "bf16": {"enabled": precision == "bf16"},
    }


def measure(local_rank: int, port: int, options: argparse.Namespace, folder: str, queue: Any) -> None:
    """One rank: build all variants, let them take turns, send the rows of the result from rank 0."""
    device, control = become_rank(local_rank, port, options.ranks)
    loader = FixedBatch(fixed_batch(local_rank, options, device))
    batons: dict[tuple[str, str, Precision], Baton] = {}
    for mode, precision, stage in contestants(options):
        baton, compiled = Baton(), mode == "compiled"
        batons[BARE if stage is None else f"stage {stage}", mode, precision] = baton
        if stage is None:
            model = build_model(recipe_of(options, compiled=False), CLASSES).to(device)
            baton.start(partial(bare_loop, model, baton.turns(loader), precision=precision, compiled=compiled))
            continue
        recipe = recipe_of(options, compiled=compiled)
        run = trainer_run(
            recipe, resolve(recipe, config_of(options, precision, stage), options.ranks, device), baton.turns(loader),
            RunFolder(Path(folder) / f"{mode}-{precision}-{stage}"), device=device, control=control,
        )  # fmt: skip
        baton.start(partial(train, run))
    seconds: dict[tuple[str, str, Precision], list[float]] = {key: [] for key in batons}
    for turn in range(options.rounds + options.warmup):
        # Forwards and backwards: whoever always came after the same other one would inherit its caches and heap.
        for key, baton in list(batons.items())[:: -1 if turn % 2 else 1]:
            dist.barrier(control)
            took = baton.time(options.steps, device) / options.steps
            if turn >= options.warmup:
                seconds[key].append(took)
    if local_rank == 0:
        names = ("variant", "mode", "precision")
        queue.put([dict(zip(names, key, strict=True)) | {"step_s": taken} for key, taken in seconds.items()])
    dist.barrier(control)
    os._exit(0)  # loops and watchdogs are still there


def parse(arguments: list[str] | None, device: str, count: int) -> argparse.Namespace:
    """The options, with defaults that suit the device and the number of GPUs, or of cores."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trainer", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: lavit_small on a GPU, lavit_tiny on a CPU")
    parser.add_argument("--size", type=int, help="side of the pictures in pixels (default: 224, on a CPU 128)")
    parser.add_argument("--micro-batch", type=int, help="pictures per rank and step (default: 128, on a CPU 16)")
    parser.add_argument("--ranks", type=int, help="processes (default: one a GPU; on a CPU 2)")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], help="ZeRO stages (default: all)")
    parser.add_argument("--rounds", type=int, help="turns in each process (default: 6 on a GPU, 8 on a CPU)")
    parser.add_argument("--processes", type=int, help="how often all begin anew, in fresh processes (default: 1 on a "
                        "GPU, 3 on a CPU, where chance decides whose memory lies well)")  # fmt: skip
    parser.add_argument("--steps", type=int, help="steps of a turn (default: on a GPU 50, the distance between two "
                        "lines of metrics; 1 on a CPU)")  # fmt: skip
    parser.add_argument("--warmup", type=int, help="turns before them (default: 1 on a GPU, 3 on a CPU)")
    parser.add_argument("--autocast", action=argparse.BooleanOptionalAction, default=None,
                        help="in bfloat16 autocast instead of fp32 (default: on a GPU)")  # fmt: skip
    parser.add_argument("--bf16-stages", type=int, nargs="+", choices=(1, 2, 3), help="ZeRO stages that also run with "
                        "weights in bfloat16 (default: on a GPU 1, as a run there has it)")  # fmt: skip
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None,
                        help="also with model.compile (default: on a GPU)")  # fmt: skip
    add_common(parser)
    options = parser.parse_args(arguments)
    gpu = device == "cuda"
    defaults: dict[str, Any] = {"autocast": gpu, "compile": gpu, "bf16_stages": [1] if gpu else []}
    defaults |= {"model": "lavit_small", "size": 224, "micro_batch": 128, "ranks": count, "steps": LOG_EVERY_STEPS,
                 "rounds": 6, "warmup": 1, "processes": 1} if gpu else {
        "model": "lavit_tiny", "size": 128, "micro_batch": 16, "ranks": min(2, count), "steps": 1,
        "rounds": 8, "warmup": 3, "processes": 3}  # fmt: skip
    if options.quick:
        defaults |= {"rounds": 3, "processes": 1}
        defaults |= {"steps": 10} if gpu else {"model": "lavit_micro", "size": 32}
    return fill_in(options, defaults)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print, and write the result; its rows."""
    gpus = torch.cuda.device_count()
    options = parse(arguments, "cuda" if gpus else "cpu", gpus or cores())
    section = Section("trainer", options, arguments)
    rows = start_ranks(measure, options)
    for _ in range(options.processes - 1):
        for row, more in zip(rows, start_ranks(measure, options), strict=True):
            row["step_s"] += more["step_s"]
    names = ("model", "size", "micro_batch", "ranks", "processes", "rounds", "steps")
    conditions = {name: getattr(options, name) for name in names} | {"log_every_steps": LOG_EVERY_STEPS}
    say(tables.trainer(section.write(conditions, rows)))
    return rows


if __name__ == "__main__":
    main()
