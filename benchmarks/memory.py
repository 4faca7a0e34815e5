"""How right `python -m pretrain.plan` is about memory: its estimate beside the measured peak of real training steps.

    python -m benchmarks.memory                     # all configurations, 2 ranks
    python -m benchmarks.memory --only 0 3          # some of them

Every configuration trains in processes of its own: the real engine (DeepSpeed) on two ranks, with everything that a
step of the trainer does. On a GPU the peak is torch's `max_memory_allocated`. On a CPU it is what the C library's
allocator has handed out (`mallinfo2`, of glibc), looked at behind every operator and every 0.2 ms. What first use
allocates for good is not counted: a tiny network is trained first, and one micro-batch goes through the network without
an engine, since oneDNN keeps scratch memory for shapes that it has seen (60 MiB for lavit_tiny in bf16). The larger of
the two ranks' peaks counts.
Prints a table and adds it to benchmarks/results/memory-DATE-MACHINE.md.
"""

import argparse
import ctypes
import gc
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.loops import (
    CLASSES,
    CONFIG,
    FixedBatch,
    become_rank,
    fixed_batch,
    start_ranks,
    trainer_run,
)
from benchmarks.report import RESULTS, tell
from models.cost import count_parameters
from pretrain.check import architecture, resolve_for
from pretrain.engine.build import build_model
from pretrain.engine.deepspeed_config import ResolvedDeepSpeed, read_deepspeed_config
from pretrain.planning.memory import Engine, Memory, memory_model
from pretrain.recipe import Recipe, validate_recipe
from pretrain.run_folder import RunFolder
from pretrain.train import train_step

STEPS = 4
GOAL = 0.15
_MIB = 2**20


@dataclass(frozen=True)
class Configuration:
    """One training whose memory is measured."""

    model: str
    size: int
    micro_batch: int
    stage: int
    precision: str = "fp32"
    policy: Any = "none"
    accumulation: int = 1
    ema: bool = False
    overrides: tuple[tuple[str, Any], ...] = ()
    zero: tuple[tuple[str, Any], ...] = ()

    @property
    def recipe(self) -> Recipe:
        """As one would pretrain."""
        return validate_recipe(
            {
                "name": "memory",
                "data": {"path": "fixed", "image_size": self.size},
                "mixing": {"mixup": 0.8, "label_smoothing": 0.1},
                "model": {
                    "name": self.model,
                    "overrides": {"drop_path": 0.1, **dict(self.overrides)},
                    "activation_checkpointing": self.policy,
                },
                "loss": {"diagonality_weight": 0.01},
                "optimizer": {"lr": 1e-3},
                "ema": {"decay": 0.99} if self.ema else None,
                "schedule": {"epochs": 1e6},
                "evaluation": {"every_epochs": 1e6},
            },
            "benchmark",
        )

    def resolved(self, ranks: int, *, gpu: bool) -> ResolvedDeepSpeed:
        """`ds_config.json` but for what is measured."""
        changes = {
            "train_batch_size": ranks * self.micro_batch * self.accumulation,
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "zero_optimization": {"stage": self.stage, **dict(self.zero)},
            "bf16": {"enabled": self.precision == "bf16"},
            "torch_autocast": {"enabled": self.precision == "bf16 autocast"},
        }
        config = read_deepspeed_config(CONFIG, changes)
        recipe = self.recipe
        parameters = count_parameters(architecture(recipe, CLASSES))
        return resolve_for(recipe, config, parameters=parameters, world_size=ranks, has_gpu=gpu, has_bf16_gpu=gpu)

    def words(self) -> str:
        """One row's beginning."""
        policy = (
            self.policy
            if isinstance(self.policy, str)
            else "stages " + " ".join(str(stage) for stage, on in enumerate(self.policy, 1) if on)
        )
        extra = (
            [f"x {self.accumulation}"] * (self.accumulation > 1)
            + ["EMA"] * self.ema
            + [f"{key} {value}" for key, value in self.zero]
        )
        return (
            f"{self.model} | {self.size} | {self.micro_batch} | {self.stage} | {self.precision} | {policy} | "
            f"{', '.join(extra)}"
        )


FIRST = (True, False, False, False)
CONFIGURATIONS = (
    Configuration("lavit_tiny", 96, 16, 0),
    Configuration("lavit_tiny", 96, 16, 1),
    Configuration("lavit_tiny", 96, 2, 1, "bf16"),
    Configuration("lavit_tiny", 96, 16, 1, "bf16", "all", ema=True),
    Configuration("lavit_tiny", 96, 8, 2, accumulation=2),
    Configuration("lavit_tiny", 96, 16, 2, "bf16", FIRST),
    Configuration("lavit_tiny", 96, 16, 3),
    Configuration("lavit_tiny", 96, 2, 3, "bf16"),
    Configuration("lavit_tiny", 96, 16, 0, "bf16 autocast"),
    Configuration("lavit_tiny", 96, 8, 2, zero=(("contiguous_gradients", True),)),
    Configuration("lavit_small", 224, 2, 1, "fp32", "none", ema=True),
    Configuration("lavit_small", 224, 4, 1, "bf16 autocast", FIRST, accumulation=2),
    Configuration("lavit_small", 224, 4, 2, "bf16", "all"),
    Configuration("lavit_base", 224, 2, 3, "fp32", "all"),
)
TINY = (("widths", (8, 8, 16, 16)), ("heads", (1, 1, 2, 2)), ("depths", (1, 1, 2, 1)))


def estimate(configuration: Configuration, ranks: int, *, gpu: bool = False) -> Memory:
    """What the plan says."""
    recipe, resolved = configuration.recipe, configuration.resolved(ranks, gpu=gpu)
    model = memory_model(architecture(recipe, CLASSES), resolved.precision, mixed=recipe.mixing.in_pairs, gpu=gpu)
    return model.memory(Engine.of(recipe, resolved), configuration.policy, configuration.micro_batch)


def measure(configuration: Configuration, device: torch.device, control: dist.ProcessGroup) -> int:
    """Bytes at the peak of training, the largest of all ranks. Collective."""
    first = Configuration(
        "lavit_micro", 32, 2, configuration.stage, configuration.precision, configuration.policy,
        ema=configuration.ema, overrides=TINY, zero=configuration.zero,
    )  # fmt: skip
    _train(first, device, control)
    _pass_once(configuration, device)
    gc.collect()
    watch = _on_gpu if device.type == "cuda" else _on_cpu
    peaks = torch.tensor([watch(lambda: _train(configuration, device, control))])
    dist.all_reduce(peaks, op=dist.ReduceOp.MAX, group=control)
    return int(peaks)


def _train(configuration: Configuration, device: torch.device, control: dist.ProcessGroup) -> None:
    resolved = configuration.resolved(dist.get_world_size(), gpu=device.type == "cuda")
    options = argparse.Namespace(size=configuration.size, micro_batch=configuration.micro_batch)
    loader = FixedBatch(fixed_batch(dist.get_rank(), options, device))
    batches = iter(loader)
    with tempfile.TemporaryDirectory() as folder:
        run = trainer_run(
            configuration.recipe, resolved, loader, RunFolder(Path(folder)), device=device, control=control
        )
        for _ in range(STEPS):
            train_step(run, batches)
            run.progress.step += 1
        run.watchdog.close()
        if run.metrics:
            run.metrics.close()


def _pass_once(configuration: Configuration, device: torch.device) -> None:
    model = build_model(configuration.recipe, CLASSES).to(device)
    dtype = torch.bfloat16 if configuration.precision == "bf16" else torch.float32
    images = torch.randn(configuration.micro_batch, 3, configuration.size, configuration.size, device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=configuration.precision == "bf16 autocast"):
        logits, diagonality = model.to(dtype)(images.to(dtype), with_diagonality=True)
    (logits.float().logsumexp(1).mean() + diagonality).backward()


def _on_gpu(train: Callable[[], None]) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train()
    return torch.cuda.max_memory_allocated() - before


class _Account(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
    )]  # fmt: skip


def _on_cpu(train: Callable[[], None]) -> int:
    account = ctypes.CDLL("libc.so.6").mallinfo2
    account.restype = _Account

    def handed_out() -> int:
        now = account()
        return int(now.uordblks + now.hblkhd)

    peak = before = handed_out()
    done = threading.Event()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal peak
            result = func(*args, **(kwargs or {}))
            peak = max(peak, handed_out())
            return result

    def sample() -> None:
        nonlocal peak
        while not done.wait(2e-4):
            peak = max(peak, handed_out())

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        with Watch():
            train()
    finally:
        done.set()
        sampler.join()
    return peak - before


def _rank(local_rank: int, port: int, options: argparse.Namespace, folder: str, queue: Any) -> None:  # noqa: ARG001
    device, control = become_rank(local_rank, port, options.ranks)
    peak = measure(options.configuration, device, control)
    if local_rank == 0:
        queue.put(peak)
    dist.barrier(control)
    os._exit(0)  # watchdogs are still there


def main(arguments: list[str] | None = None) -> list[float]:
    """Measure, print, and add to the results; the relative errors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--only", type=int, nargs="+", default=range(len(CONFIGURATIONS)), metavar="N",
                        help="rows to measure, counted from 0 (default: all)")  # fmt: skip
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the table")
    options = parser.parse_args(arguments)
    rows, errors = [], []
    for number in options.only:
        options.configuration = configuration = CONFIGURATIONS[number]
        began = time.monotonic()
        said = estimate(configuration, options.ranks, gpu=torch.cuda.is_available()).total
        seen = start_ranks(_rank, options)
        errors.append(said / seen - 1)
        rows.append(f"| {configuration.words()} | {seen / _MIB:.1f} | {said / _MIB:.1f} | {100 * errors[-1]:+.1f} % |")
        print(rows[-1], f"{time.monotonic() - began:.0f} s", flush=True)  # noqa: T201
    worst = max(map(abs, errors))
    what = (
        f"`python -m benchmarks.memory {' '.join(sys.argv[1:] if arguments is None else arguments)}`: {options.ranks} "
        f"ranks, mixup, drop path, diagonality loss, AdamW, ds_config.json but for what stands here; {STEPS} steps."
    )
    lines = [
        what,
        "",
        "| model | pixels | images | ZeRO | precision | recomputed | besides | measured, MiB | planned, MiB | error |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        f"Largest error {100 * worst:.1f} % (goal: {100 * GOAL:.0f} %).",
    ]
    tell("memory", lines, options.results)
    return errors


if __name__ == "__main__":
    main()
