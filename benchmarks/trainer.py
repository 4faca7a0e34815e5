"""What the trainer costs: its whole loop at every ZeRO stage beside a bare torch DDP loop of the same model.

    python -m benchmarks.trainer                                 # on whatever device there is
    python -m benchmarks.trainer --ranks 8 --stages 0 1 --micro-batch 64 --no-compile

All variants live in the same processes and take turns on the same fixed batches, so that whatever else the machine does
hits all; before a turn the ranks meet, and then its steps are timed. On a CPU all of it begins anew in fresh processes,
since from one process to the next a ratio differs by more than the turns in one of them tell. The trainer's side is
`pretrain.train.train` itself, with everything that it does between two steps, but for the loader: that gives the same
tensors again and again. Compiled stages are set against a bare loop that is compiled, too. Prints a table and writes a
section of benchmarks/results/bench-DATE-MACHINE.json.
"""

import argparse
import json
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from benchmarks import tables
from benchmarks.loops import (
    CLASSES,
    CONFIG,
    Baton,
    FixedBatch,
    become_rank,
    fixed_batch,
    recipe_of,
    resolve,
    start_ranks,
    trainer_run,
)
from benchmarks.report import Section, add_common, cores, fill_in, say
from data_pipeline.batch import Batch
from pretrain.engine.build import build_model
from pretrain.run_folder import RunFolder
from pretrain.train import train

BARE = tables.BARE


def bare_loop(model: torch.nn.Module, batches: Iterable[Batch], *, autocast: bool, compiled: bool) -> None:
    """What a person would write without this project: DDP, fused AdamW, clipping."""
    device = next(model.parameters()).device
    spared = model.no_weight_decay()
    groups = [
        {"params": [p for n, p in model.named_parameters() if n not in spared], "weight_decay": 0.05},
        {"params": [p for n, p in model.named_parameters() if n in spared], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    if compiled:
        model.forward = torch.compile(model.forward, fullgraph=True)  # as pretrain.engine.build does it
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    for batch in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            logits, diagonality = ddp(batch.images, with_diagonality=True)
        loss = cross_entropy(logits.float(), batch.labels, label_smoothing=0.1) + 0.01 * diagonality
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def config_of(options: argparse.Namespace, stage: int) -> dict[str, Any]:
    """ds_config.json but for the stage, and for fp32 weights, which the bare loop has."""
    return {
        "train_batch_size": options.ranks * options.micro_batch,
        "gradient_clipping": 1.0,
        "zero_optimization": {**json.loads(CONFIG.read_text())["zero_optimization"], "stage": stage},
        "torch_autocast": {"enabled": options.autocast},
        "bf16": {"enabled": False},
    }


def measure(local_rank: int, port: int, options: argparse.Namespace, folder: str, queue: Any) -> None:
    """One rank: build all variants, let them take turns, send the rows of the result from rank 0."""
    device, control = become_rank(local_rank, port, options.ranks)
    loader = FixedBatch(fixed_batch(local_rank, options, device))
    modes = {"eager": False, "compiled": True} if options.compile else {"eager": False}
    batons: dict[tuple[str, str], Baton] = {}
    for mode, compiled in modes.items():
        baton = batons[BARE, mode] = Baton()
        model = build_model(recipe_of(options, compiled=False), CLASSES).to(device)
        loop = partial(bare_loop, model, baton.turns(loader), autocast=options.autocast, compiled=compiled)
        baton.start(loop)
        for stage in options.stages:
            if compiled and stage == 3:
                continue  # which the trainer refuses
            baton = batons[f"stage {stage}", mode] = Baton()
            recipe = recipe_of(options, compiled=compiled)
            run = trainer_run(
                recipe, resolve(recipe, config_of(options, stage), options.ranks, device), baton.turns(loader),
                RunFolder(Path(folder) / f"{mode}-{stage}"), device=device, control=control,
            )  # fmt: skip
            baton.start(partial(train, run))
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in batons}
    for turn in range(options.rounds + options.warmup):
        # Forwards and backwards: whoever always came after the same other one would inherit its caches and heap.
        for key, baton in list(batons.items())[:: -1 if turn % 2 else 1]:
            dist.barrier(control)
            took = baton.time(options.steps, device) / options.steps
            if turn >= options.warmup:
                seconds[key].append(took)
    if local_rank == 0:
        queue.put([{"variant": name, "mode": mode, "step_s": taken} for (name, mode), taken in seconds.items()])
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
    parser.add_argument("--rounds", type=int, help="turns in each process (default: 20 on a GPU, 8 on a CPU)")
    parser.add_argument("--processes", type=int, help="how often all begin anew, in fresh processes (default: 1 on a "
                        "GPU, 3 on a CPU, where chance decides whose memory lies well)")  # fmt: skip
    parser.add_argument("--steps", type=int, help="steps of a turn (default: 10 on a GPU, where the host must run "
                        "ahead of the device; 1 on a CPU)")  # fmt: skip
    parser.add_argument("--warmup", type=int, default=3, help="turns before them (default: 3)")
    parser.add_argument("--autocast", action=argparse.BooleanOptionalAction, default=None,
                        help="in bfloat16 autocast instead of fp32 (default: on a GPU)")  # fmt: skip
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None,
                        help="also with model.compile (default: on a GPU)")  # fmt: skip
    add_common(parser)
    options = parser.parse_args(arguments)
    gpu = device == "cuda"
    defaults: dict[str, Any] = {"autocast": gpu, "compile": gpu}
    defaults |= {"model": "lavit_small", "size": 224, "micro_batch": 128, "ranks": count, "steps": 10,
                 "rounds": 20, "processes": 1} if gpu else {
        "model": "lavit_tiny", "size": 128, "micro_batch": 16, "ranks": min(2, count), "steps": 1,
        "rounds": 8, "processes": 3}  # fmt: skip
    if options.quick:
        defaults |= {"rounds": 3, "processes": 1} | ({} if gpu else {"model": "lavit_micro", "size": 32})
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
    conditions = {name: getattr(options, name) for name in names}
    conditions["precision"] = "bf16 autocast" if options.autocast else "fp32"
    say(tables.trainer(section.write(conditions, rows)))
    return rows


if __name__ == "__main__":
    main()
