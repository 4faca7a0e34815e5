"""Cost of the trainer: its loop at each ZeRO stage, a bare DeepSpeed loop at the same stage, a bare torch DDP loop.

All loops are in the same processes and take turns on the same fixed batches. The trainer's loop is ``Trainer.train``
with another loader; it neither evaluates nor saves meanwhile. Compiled stages are compared with compiled bare loops,
and weights in bf16, too, with DDP in autocast. On a CPU everything starts again in fresh processes several times: from
process to process a ratio varies more than within one. ``benchmarks.end_to_end`` runs loops on other batches, too.
"""

import argparse
import contextlib
import io
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from benchmarks import timing
from benchmarks.data import build_shards, pillow
from data_pipeline.batch import Batch
from models import LaViT
from pretrain.build import open_trainer
from pretrain.devices import use_gpu
from pretrain.engine.deepspeed_config import read_deepspeed_config, resolve_for
from pretrain.engine.distributed import choose_device, has_bf16, init_distributed, read_rank
from pretrain.engine.engine import build_model, compile_forward
from pretrain.ports import free_port
from pretrain.recipe import Recipe, validate_recipe
from pretrain.run_folder import RunFolder
from pretrain.trainer import Trainer

CONFIG = Path(__file__).parent.parent / "ds_config.json"
CLASSES = 10
PILLOW = "DDP + webdataset + Pillow"
AT_EACH_STAGE = ("DeepSpeed", "trainer", "trainer on its loader")
"""Kinds of loops that are run at each ZeRO stage; the others are ``DDP``, ``PILLOW``, and the ``loader`` alone."""
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
        """No epochs and ids of samples, which the trainer asks for where a loss spikes."""
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


def deepspeed_loop(model: LaViT, batches: Iterable[Batch], config: dict[str, Any], *, compiled: bool) -> None:
    """A plain DeepSpeed loop: ``deepspeed.initialize``, ``backward``, ``step``, and nothing else."""
    import deepspeed  # noqa: PLC0415 - slow to import

    if compiled:
        compile_forward(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=True)
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    dtype = next(engine.module.parameters()).dtype
    for batch in batches:
        logits, diagonality = engine(batch.images.to(dtype), with_diagonality=True)
        engine.backward(cross_entropy(logits.float(), batch.labels, label_smoothing=0.1) + 0.01 * diagonality.float())
        engine.step()


def bare_loop(model: LaViT, batches: Iterable[Batch], *, autocast: bool, compiled: bool) -> None:
    """A plain torch loop: DDP, fused AdamW, clipping, fp32 weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=True)
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
    data = {"augment": {"random_resized_crop": {}, "horizontal_flip": 0.5}, **data}
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


def started(trainer: Trainer, batches: Iterable[Batch] | None = None) -> Stepper:
    """The trainer's loop on the batches of its own loader or on others, run up to the first."""
    trainer.train_loader = stepper = Stepper(trainer.train_loader if batches is None else batches)
    stepper.start(trainer.train)
    return stepper


def changes_of(options: argparse.Namespace, stage: int, *, bf16: bool) -> dict[str, Any]:
    """What ds_config.json is changed by: the ZeRO stage, and weights in bf16 or, where that is asked for, autocast."""
    return {
        "train_batch_size": options.ranks * options.micro_batch, "zero_optimization": {"stage": stage},
        "torch_autocast": {"enabled": options.autocast and not bf16}, "bf16": {"enabled": bf16},
    }  # fmt: skip


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
        arguments = (free_port(), options, Path(folder), queue)
        mp.start_processes(measure, arguments, nprocs=options.ranks, start_method="spawn")
        return queue.get()


def pillow_batches(recipe: Recipe, micro_batch: int, device: torch.device) -> Iterator[Batch]:
    """Batches of torch's DataLoader on the device."""
    data, resampling = recipe.data, Image.Resampling[recipe.data.interpolation.upper()]
    settings = {"threads": data.threads or 1, "side": data.size[0], "resampling": resampling}
    for images, labels in pillow(Path(data.path), device, micro_batch, **settings):
        rows = np.arange(len(labels))
        yield Batch(images, labels, rows, rows * 0, rows, rows >= 0)


def contestants(options: argparse.Namespace) -> Iterator[Contestant]:
    """In each mode the kinds of loops, and at each ZeRO stage those that have one, with weights in bf16, too."""
    stages = [(stage, False) for stage in options.stages] + [(stage, True) for stage in options.bf16_stages]
    for mode in options.modes:
        for kind in options.kinds:
            for stage, bf16 in stages if kind in AT_EACH_STAGE else [(0, False)]:
                if (mode, stage) != ("compiled", 3):  # which is refused
                    yield mode, kind, stage, bf16


def start(
    key: Contestant, options: argparse.Namespace, path: Path, device: torch.device, control: dist.ProcessGroup
) -> Stepper:
    """A contestant's loop, up to its first batch."""
    mode, kind, stage, bf16 = key
    compiled, fixed = mode == "compiled", fixed_batches(dist.get_rank(), options, device)
    recipe = recipe_of(options, compiled=compiled, threads=options.threads)
    changes = changes_of(options, stage, bf16=bf16)
    if kind in {"trainer", "trainer on its loader", "loader"}:
        trainer = build(recipe, changes, path, device, control)
        if kind != "loader":
            return started(trainer, fixed if kind == "trainer" else None)
        stepper = Stepper(trainer.train_loader)
        stepper.start(partial(deque, stepper, 0))
        return stepper
    stepper = Stepper(pillow_batches(recipe, options.micro_batch, device) if kind == PILLOW else fixed)
    model = build_model(recipe, CLASSES).to(device)
    if kind == "DeepSpeed":
        ranks = {"world_size": options.ranks, "has_gpu": device.type == "cuda", "has_bf16_gpu": has_bf16(device)}
        config = resolve_for(recipe, read_deepspeed_config(CONFIG, changes), **ranks).config
        stepper.start(partial(deepspeed_loop, model, stepper, config, compiled=compiled))
    else:
        stepper.start(partial(bare_loop, model, stepper, autocast=options.autocast, compiled=compiled))
    return stepper


def measure(rank: int, port: int, options: argparse.Namespace, folder: Path, queue: Any) -> None:
    """On one rank: let the loops take turns; rank 0 sends seconds per step of the slowest rank."""
    device, control = join(rank, port, options.ranks)
    loops = {key: start(key, options, folder / str(i), device, control) for i, key in enumerate(contestants(options))}
    seconds: dict[Contestant, list[float]] = {key: [] for key in loops}
    for key, counts in timing.turns([*loops], options.rounds, options.warmup):
        loops[key].seconds(options.skipped, device)
        dist.barrier(control)
        took = torch.tensor(loops[key].seconds(options.steps, device) / options.steps)
        dist.all_reduce(took, op=dist.ReduceOp.MAX, group=control)
        if counts:
            seconds[key].append(took.item())
    if rank == 0:
        queue.put(seconds)
    dist.barrier(control)
    os._exit(0)  # loops and watchdogs are still running


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the result."""
    gpus = torch.cuda.device_count() if use_gpu() else 0
    defaults = {"stages": [0, 1, 2, 3], "bf16_stages": [1] if gpus else [], "kinds": ["DDP", "DeepSpeed", "trainer"]}
    gpu = {"model": "lavit_small", "size": 224, "micro_batch": 128, "ranks": gpus, "steps": 50, "rounds": 6}
    gpu |= {"warmup": 1, "processes": 1, "autocast": True, "modes": ["eager", "compiled"]}
    cpu = {"model": "lavit_tiny", "size": 128, "micro_batch": 16, "ranks": 2, "steps": 1, "rounds": 8, "warmup": 3}
    cpu |= {"processes": 3, "autocast": False, "modes": ["eager"]}
    quick = {"rounds": 2, "processes": 1, "warmup": 1} | ({} if gpus else {"model": "lavit_micro", "size": 32})
    defaults |= {"threads": 1, "skipped": 0} | (gpu if gpus else cpu)
    options = timing.parse("trainer", __doc__, arguments, defaults=defaults, quick=quick)
    seconds: dict[Contestant, list[float]] = {key: [] for key in contestants(options)}
    with tempfile.TemporaryDirectory() as scratch:
        options.shards = build_shards(Path(scratch), 20)
        for _ in range(options.processes):
            for key, taken in start_ranks(measure, options).items():
                seconds[key] += taken
    rows = [
        {
            "loop": kind, "stage": stage, "weights": "bf16" if bf16 else "fp32", "mode": mode, "step_s": taken,
            "time_over_ddp": timing.ratio(taken, seconds.get((mode, "DDP", 0, False), taken)),
            "time_over_deepspeed": timing.ratio(taken, seconds.get((mode, "DeepSpeed", stage, bf16), taken)),
        }
        for (mode, kind, stage, bf16), taken in seconds.items()
    ]  # fmt: skip
    names = ("model", "size", "micro_batch", "ranks", "processes", "rounds", "steps", "autocast")
    timing.write(options, {name: getattr(options, name) for name in names}, rows)


if __name__ == "__main__":
    main()
