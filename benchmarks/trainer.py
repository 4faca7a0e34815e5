"""Cost of the trainer: its loop at each ZeRO stage, a bare DeepSpeed loop at the same stage, a bare torch DDP loop.

All loops are in the same processes and take turns on the same fixed batches. The trainer's loop is ``Trainer.train``
with another loader; it neither evaluates nor saves meanwhile. Compiled stages are compared with compiled bare loops,
and weights in bf16, too, with DDP in autocast. On a CPU everything starts again in fresh processes several times: from
process to process a ratio varies more than within one.
"""

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from benchmarks import timing
from benchmarks.data import build_shards
from data_pipeline.batch import Batch
from models import LaViT
from pretrain.build import open_trainer
from pretrain.check import resolve_for
from pretrain.devices import use_gpu
from pretrain.engine.deepspeed_config import read_deepspeed_config
from pretrain.engine.distributed import choose_device, has_bf16, init_distributed, read_rank
from pretrain.engine.engine import build_model, compile_forward
from pretrain.ports import free_port
from pretrain.recipe import Recipe, validate_recipe
from pretrain.run_folder import RunFolder
from pretrain.trainer import Trainer

CONFIG = Path(__file__).parent.parent / "ds_config.json"
CLASSES = 10
Contestant = tuple[str, str, int, bool]
"""Mode, kind of loop, ZeRO stage, whether weights are in bf16."""


class Stepper:
    """Runs a loop in a thread that waits for its next batch until ``step`` is called."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches, self._error = batches, None
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)

    def __iter__(self) -> Iterator[Batch]:
        """One batch per step; loading it is part of the step."""
        batches = iter(self._batches)
        while True:
            self._back.release()
            self._go.acquire()
            yield next(batches)

    def samples(self, start: int, stop: int) -> Any:
        """Epochs and ids of samples, which the trainer asks for where a loss spikes."""
        return np.zeros((2, stop - start), np.int64)

    def start(self, loop: Callable[[], object]) -> None:
        """Run a loop over this iterable up to its first batch."""
        gpu = torch.cuda.current_device() if torch.cuda.is_available() else None

        def body() -> None:
            if gpu is not None:
                torch.cuda.set_device(gpu)  # a new thread has the first one
            try:
                loop()
            except BaseException as error:  # noqa: BLE001 - raised by the thread that waits
                self._error = error
            self._back.release()

        threading.Thread(target=body, daemon=True).start()
        self._wait()

    def seconds(self, steps: int, device: torch.device) -> float:
        """Take steps; their wall time until the device is idle."""
        began = time.perf_counter()
        for _ in range(steps):
            self._go.release()
            self._wait()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    def _wait(self) -> None:
        self._back.acquire()
        if self._error is not None:
            raise self._error


def fused_adamw(model: LaViT) -> torch.optim.Optimizer:
    """AdamW as plain torch has it; norms and biases without weight decay."""
    no_decay, named = model.no_weight_decay(), [*model.named_parameters()]
    groups = [
        {"params": [p for n, p in named if n not in no_decay], "weight_decay": 0.05},
        {"params": [p for n, p in named if n in no_decay], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, fused=True)


def deepspeed_loop(model: LaViT, batches: Iterable[Batch], config: dict[str, Any], *, compiled: bool) -> None:
    """A plain DeepSpeed loop: ``deepspeed.initialize``, ``backward``, ``step``, and nothing else."""
    import deepspeed  # noqa: PLC0415 - slow to import

    if compiled:
        compile_forward(model)
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=fused_adamw(model), config=config, dist_init_required=False
        )
    dtype = next(engine.module.parameters()).dtype
    for batch in batches:
        logits, diagonality = engine(batch.images.to(dtype), with_diagonality=True)
        engine.backward(cross_entropy(logits.float(), batch.labels, label_smoothing=0.1) + 0.01 * diagonality.float())
        engine.step()


def bare_loop(model: LaViT, batches: Iterable[Batch], *, autocast: bool, compiled: bool) -> None:
    """A plain torch loop: DDP, fused AdamW, clipping, fp32 weights."""
    optimizer = fused_adamw(model)
    if compiled:
        compile_forward(model)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    for batch in batches:
        with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=autocast):
            logits, diagonality = ddp(batch.images, with_diagonality=True)
        loss = cross_entropy(logits.float(), batch.labels, label_smoothing=0.1) + 0.01 * diagonality.float()
        ddp.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def recipe_of(options: argparse.Namespace, *, compiled: bool, **data: Any) -> Recipe:
    """A recipe for pretraining on ``options.shards`` that never evaluates or saves."""
    content = {
        "name": "benchmark", "data": {"path": str(options.shards), "image_size": options.size, **data},
        "mixing": {"label_smoothing": 0.1}, "loss": {"diagonality_weight": 0.01}, "optimizer": {"lr": 1e-3},
        "model": {"name": options.model, "overrides": {"drop_path": 0.1}, "compile": compiled},
        "schedule": {"epochs": 1e6, "warmup_epochs": 1}, "evaluation": {"every_epochs": 1e6},
        "checkpoint": {"every_steps": 10**9}, "watchdog": {"start_minutes": 16_000, "step_minutes": 16_000},
    }  # fmt: skip
    return validate_recipe(content, "benchmark")


def build(
    recipe: Recipe, changes: dict[str, Any], path: Path, device: torch.device, control: dist.ProcessGroup
) -> Trainer:
    """A trainer as ``pretrain.main`` builds it, with changes to ds_config.json."""
    with contextlib.redirect_stdout(io.StringIO()):
        config = read_deepspeed_config(CONFIG, changes)
        return open_trainer(recipe, config, RunFolder(path), device=device, control=control)


def join(rank: int, port: int, ranks: int) -> tuple[torch.device, dist.ProcessGroup]:
    """Make this process a rank; its device, and a CPU group of all ranks."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device = choose_device(read_rank())
    return device, init_distributed(device)


def fixed_batches(rank: int, options: argparse.Namespace, device: torch.device) -> list[Batch]:
    """The same random batch many times; another one on each rank."""
    rows = np.arange(options.micro_batch) + rank * options.micro_batch
    generator = torch.Generator().manual_seed(rank)
    images = torch.randn(len(rows), 3, options.size, options.size, generator=generator).to(device)
    labels = torch.randint(CLASSES, (len(rows),), generator=generator).to(device)
    return [Batch(images, labels, rows, rows * 0, rows, rows >= 0)] * 10**6


def start_ranks(measure: Callable[..., None], options: argparse.Namespace) -> Any:
    """Run ``measure(rank, port, options, folder, queue)`` on all ranks; returns what rank 0 puts into the queue."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    queue = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        if not hasattr(options, "shards"):
            options.shards = build_shards(Path(folder), 20)
        arguments = (free_port(), options, Path(folder), queue)
        mp.start_processes(measure, arguments, nprocs=options.ranks, start_method="spawn")
        return queue.get()


def contestants(options: argparse.Namespace) -> list[Contestant]:
    """In each mode DDP, and at each ZeRO stage DeepSpeed and the trainer, in DDP's precision or weights in bf16."""
    stages = [(stage, False) for stage in options.stages] + [(stage, True) for stage in options.bf16_stages]
    found: list[Contestant] = []
    for mode in ("eager", "compiled") if options.compile else ("eager",):
        found.append((mode, "DDP", 0, False))
        for stage, bf16 in stages:
            if (mode, stage) != ("compiled", 3):  # which is refused
                found += [(mode, kind, stage, bf16) for kind in ("DeepSpeed", "trainer")]
    return found


def measure(rank: int, port: int, options: argparse.Namespace, folder: Path, queue: Any) -> None:
    """On one rank: let the loops take turns; rank 0 sends seconds per step, and those of checkpoints."""
    device, control = join(rank, port, options.ranks)
    batches, steppers = fixed_batches(rank, options, device), {}
    trainer: Trainer | None = None
    for number, key in enumerate(contestants(options)):
        (mode, kind, stage, bf16), stepper = key, Stepper(batches)
        recipe, steppers[key] = recipe_of(options, compiled=mode == "compiled"), stepper
        compiled = recipe.model.compile
        if kind == "DDP":
            model = build_model(recipe, CLASSES).to(device)
            stepper.start(partial(bare_loop, model, stepper, autocast=options.autocast, compiled=compiled))
            continue
        changes = {
            "train_batch_size": options.ranks * options.micro_batch, "zero_optimization": {"stage": stage},
            "torch_autocast": {"enabled": options.autocast and not bf16}, "bf16": {"enabled": bf16},
        }  # fmt: skip
        if kind == "DeepSpeed":
            model = build_model(recipe, CLASSES).to(device)
            ranks = {"world_size": options.ranks, "has_gpu": device.type == "cuda", "has_bf16_gpu": has_bf16(device)}
            resolved = resolve_for(recipe, read_deepspeed_config(CONFIG, changes), **ranks)
            stepper.start(partial(deepspeed_loop, model, stepper, resolved.config, compiled=compiled))
            continue
        trainer = build(recipe, changes, folder / str(number), device, control)
        trainer.train_loader = stepper
        stepper.start(trainer.train)
    seconds: dict[Contestant, list[float]] = {key: [] for key in steppers}
    for key, counts in timing.turns([*steppers], options.rounds, options.warmup):
        dist.barrier(control)
        took = steppers[key].seconds(options.steps, device) / options.steps
        if counts:
            seconds[key].append(took)
    waits, writes = [], []
    for _ in range(5 if trainer is not None else 0):  # of the last contestant
        began = time.perf_counter()
        trainer.save()
        waits.append(time.perf_counter() - began)
        trainer.finish_save()
        writes.append(time.perf_counter() - began)
    if rank == 0:
        queue.put((seconds, {"checkpoint_wait_s": waits, "checkpoint_write_s": writes}))
    dist.barrier(control)
    os._exit(0)  # loops and watchdogs are still running


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the result."""
    gpus = torch.cuda.device_count() if use_gpu() else 0
    gpu = {"model": "lavit_small", "size": 224, "micro_batch": 128, "ranks": gpus, "steps": 50, "rounds": 6}
    gpu |= {"warmup": 1, "processes": 1, "autocast": True, "compile": True, "stages": [0, 1, 2, 3], "bf16_stages": [1]}
    cpu = {"model": "lavit_tiny", "size": 128, "micro_batch": 16, "ranks": 2, "steps": 1, "rounds": 8, "warmup": 3}
    cpu |= {"processes": 3, "autocast": False, "compile": False, "stages": [0, 1, 2, 3], "bf16_stages": []}
    quick = {"rounds": 2, "processes": 1, "warmup": 1} | ({} if gpus else {"model": "lavit_micro", "size": 32})
    options = timing.parse("trainer", __doc__, arguments, defaults=gpu if gpus else cpu, quick=quick)
    seconds, checkpoints = start_ranks(measure, options)
    for _ in range(options.processes - 1):
        del options.shards
        for key, taken in start_ranks(measure, options)[0].items():
            seconds[key] += taken
    rows = [
        {
            "loop": kind, "stage": stage, "weights": "bf16" if bf16 else "fp32", "mode": mode, "step_s": taken,
            "time_over_ddp": timing.ratio(taken, seconds[mode, "DDP", 0, False]),
            "time_over_deepspeed": timing.ratio(taken, seconds.get((mode, "DeepSpeed", stage, bf16), taken)),
        }
        for (mode, kind, stage, bf16), taken in seconds.items()
    ]  # fmt: skip
    names = ("model", "size", "micro_batch", "ranks", "processes", "rounds", "steps", "autocast")
    medians = {name: statistics.median(values) for name, values in checkpoints.items() if values}
    timing.write(options, {name: getattr(options, name) for name in names} | medians, rows)


if __name__ == "__main__":
    main()
