"""The trainer's own loop, and a bare one, as benchmarks run them: in the same processes, taking turns.

A loop runs in a thread and stands still where it asks for its next batch; a ``Baton`` lets it go on for one step. So
whatever else the machine does hits all loops alike.
"""

import argparse
import contextlib
import io
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from data_pipeline.batch import Batch
from data_pipeline.order import Int64
from models import LaViT
from models.cost import count_parameters
from pretrain.check import architecture, resolve_for
from pretrain.checkpoints.checkpoint import Progress
from pretrain.checkpoints.pieces import OptimizerPieces
from pretrain.checkpoints.writer import CheckpointWriter, Retention
from pretrain.console import RunConsole
from pretrain.engine.build import build_engine, build_model, compile_forward
from pretrain.engine.deepspeed_config import ResolvedDeepSpeed
from pretrain.engine.distributed import choose_device, has_bf16, init_distributed, new_cpu_group, read_rank
from pretrain.engine.precision import Precision, input_dtype
from pretrain.losses import Classification
from pretrain.metrics import MetricsWriter
from pretrain.monitoring.monitor import Monitor
from pretrain.ports import free_port
from pretrain.recipe import Recipe, validate_recipe
from pretrain.run import Run
from pretrain.run_folder import RunFolder
from pretrain.run_state import RunState
from pretrain.survival.bad_steps import BadSteps
from pretrain.survival.signals import StopFlag
from pretrain.survival.stop import StopAgreement
from pretrain.survival.watchdog import Watchdog

CONFIG = Path(__file__).parent.parent / "ds_config.json"
CLASSES = 1000


class Loader(Protocol):
    """What the trainer asks of a ``TrainLoader``."""

    def __iter__(self) -> Iterator[Batch]:
        """Batches without end."""

    def samples(self, start: int, stop: int) -> tuple[Int64, Int64]:
        """Epochs and sample ids of positions of the stream."""


@dataclass(frozen=True)
class FixedBatch:
    """A loader that gives the same batch for ever and costs nothing."""

    batch: Batch

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batch, again and again."""
        while True:
            yield self.batch

    def samples(self, start: int, stop: int) -> tuple[Int64, Int64]:
        """It knows of no samples: all are number 0 of epoch 0. Asked for where the loss spikes."""
        return np.zeros(stop - start, np.int64), np.zeros(stop - start, np.int64)


@dataclass
class Baton:
    """Lets several loops, each in a thread of its own, take one step at a time, in turn."""

    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    back: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    ended: bool = False
    error: BaseException | None = None

    def turns(self, loader: Iterable[Batch]) -> "Turns":
        """Batches, one a turn: the loop that iterates waits between its steps. The trainer wants a ``Loader``'s."""
        return Turns(self, loader)

    def step(self) -> None:
        """Let the loop take one step, and wait for it; not for its device."""
        self.go.release()
        self.back.acquire()
        if self.error is not None:
            raise self.error

    def time(self, steps: int, device: torch.device) -> float:
        """Seconds that so many steps take together, until their device has nothing left to do."""
        began = time.perf_counter()
        for _ in range(steps):
            self.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    def start(self, loop: Callable[[], object]) -> None:
        """Run a loop up to its first turn."""
        # A new thread would compute on the first GPU, whichever its process has chosen.
        gpu = torch.cuda.current_device() if torch.cuda.is_available() else None

        def body() -> None:
            if gpu is not None:
                torch.cuda.set_device(gpu)
            try:
                with contextlib.suppress(StopIteration):
                    loop()
            except BaseException as error:  # noqa: BLE001 - told by the thread that waits
                self.error = error
            self.back.release()

        threading.Thread(target=body, daemon=True).start()
        self.back.acquire()
        if self.error is not None:
            raise self.error

    def end(self) -> None:
        """End the loop."""
        self.ended = True
        self.go.release()
        self.back.acquire()


class Turns:
    """A loader whose batches come one a turn of a baton."""

    def __init__(self, baton: Baton, loader: Iterable[Batch]) -> None:
        self._baton, self._loader = baton, loader

    def __iter__(self) -> Iterator[Batch]:
        """Yield a batch whenever the baton says so. What the loader takes for it is part of the turn."""
        batches = iter(self._loader)
        while True:
            self._baton.back.release()
            self._baton.go.acquire()
            if self._baton.ended:
                return
            yield next(batches)

    def samples(self, start: int, stop: int) -> tuple[Int64, Int64]:
        """As the loader has it."""
        return self._loader.samples(start, stop)


def bare_loop(model: LaViT, batches: Iterable[Batch], *, precision: Precision, compiled: bool) -> None:
    """What a person would write without this project: DDP, fused AdamW, clipping.

    Args:
        model: whose fp32 weights lie on the device.
        batches: on the device, too.
        precision: ``bf16`` makes weights and gradients bfloat16, also on their way between the ranks. AdamW then steps
            fp32 masters, which every rank keeps whole.
        compiled: compile the network.
    """
    weights = [*model.parameters()]
    masters = weights
    if precision == "bf16":
        masters = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
        for master in masters:
            master.grad = torch.zeros_like(master)
        model.bfloat16()
    spared = model.no_weight_decay()
    named = [(name, master) for (name, _), master in zip(model.named_parameters(), masters, strict=True)]
    groups = [
        {"params": [p for n, p in named if n not in spared], "weight_decay": 0.05},
        {"params": [p for n, p in named if n in spared], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    if compiled:
        compile_forward(model)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    for batch in batches:
        loss = bare_loss(ddp, batch, precision)
        ddp.zero_grad()
        loss.backward()
        with torch.no_grad():
            if masters is not weights:
                torch._foreach_copy_([p.grad for p in masters], [p.grad for p in weights])
            torch.nn.utils.clip_grad_norm_(masters, 1.0)
            optimizer.step()
            if masters is not weights:
                torch._foreach_copy_(weights, masters)


def bare_loss(model: torch.nn.Module, batch: Batch, precision: Precision) -> torch.Tensor:
    """The scalar that the bare loop minimises: LaViT's two losses, as the trainer has them with ``recipe_of``."""
    images = batch.images.to(input_dtype(precision))
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16 autocast"):
        logits, diagonality = model(images, with_diagonality=True)
    return cross_entropy(logits.float(), batch.labels, label_smoothing=0.1) + 0.01 * diagonality.float()


def recipe_of(options: argparse.Namespace, *, compiled: bool, data: dict[str, Any] | None = None) -> Recipe:
    """A recipe as one would pretrain: soft targets, diagonality loss, drop path, decay groups, warm-up."""
    model: dict[str, Any] = {"name": options.model, "overrides": {"drop_path": 0.1}}
    if compiled:
        model["compile"] = True
    return validate_recipe(
        {
            "name": "benchmark",
            "data": {"path": "fixed", "image_size": options.size} | (data or {}),
            "mixing": {"label_smoothing": 0.1},
            "model": model,
            "loss": {"diagonality_weight": 0.01},
            "optimizer": {"lr": 1e-3},
            "schedule": {"epochs": 1e6, "warmup_epochs": 1},
            "evaluation": {"every_epochs": 1e6},
            "checkpoint": {"every_steps": 10**9},
        },
        "benchmark",
    )


def resolve(recipe: Recipe, config: dict[str, Any], ranks: int, device: torch.device) -> ResolvedDeepSpeed:
    """DeepSpeed's configuration made concrete as `pretrain.main` does it."""
    parameters = count_parameters(architecture(recipe, CLASSES))
    return resolve_for(
        recipe, config, parameters=parameters, world_size=ranks, has_gpu=device.type == "cuda",
        has_bf16_gpu=has_bf16(device),
    )  # fmt: skip


def trainer_run(
    recipe: Recipe,
    resolved: ResolvedDeepSpeed,
    loader: Loader,
    folder: RunFolder,
    *,
    device: torch.device,
    control: dist.ProcessGroup,
) -> Run:
    """A run as `pretrain.assemble` makes it, but for the data; it begins in an empty folder."""
    first = dist.get_rank() == 0
    engine, _ = build_engine(build_model(recipe, CLASSES), recipe, resolved, device)
    folder.path.mkdir(parents=True, exist_ok=True)
    if first:  # what a run tells its sinks of
        (folder.path / "environment.json").write_text("{}")
        (folder.path / "recipe.yaml").write_text("")
    with contextlib.redirect_stdout(io.StringIO()):
        console = RunConsole(speaks=first, total_steps=10**9, first_step=0, global_batch=resolved.batch.global_batch)
    pieces = OptimizerPieces(engine, average=recipe.ema is not None)
    monitor = Monitor(
        engine,
        pieces,
        device=device,
        precision=resolved.precision,
        attention_pictures=recipe.watch.attention_pictures,
        data=recipe.data,
        class_names=tuple(str(number) for number in range(CLASSES)),
        request=folder.show,
        fresh=False,
    )
    return Run(
        recipe=recipe,
        batch=resolved.batch,
        epoch_size=10**4,
        total_steps=10**9,
        device=device,
        engine=engine,
        dtype=input_dtype(resolved.precision),
        pieces=pieces,
        bad_steps=BadSteps(engine),
        writer=CheckpointWriter(
            folder.checkpoints, pieces, retention=Retention(), facts={}, group=new_cpu_group(1800.0)
        ),
        classification=Classification(recipe.loss, recipe.mixing, (), device),
        train_loader=loader,
        eval_loader=None,
        folder=folder,
        state=RunState("running"),
        probes=None,
        metrics=MetricsWriter(folder.metrics, folder.tensorboard, samples_seen=0) if first else None,
        console=console,
        stop=StopAgreement(StopFlag(), control),
        control=control,
        progress=Progress(),
        watchdog=Watchdog(folder.hangs, dist.get_rank(), start_s=1e6, step_s=1e6),
        monitor=monitor,
    )


def become_rank(local_rank: int, port: int, ranks: int) -> tuple[torch.device, dist.ProcessGroup]:
    """Make this process one of several on this machine; its device, and the CPU group of all."""
    os.environ |= {name: str(local_rank) for name in ("RANK", "LOCAL_RANK")}
    os.environ |= {name: str(ranks) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device = choose_device(read_rank())
    return device, init_distributed(device)


def fixed_batch(local_rank: int, options: argparse.Namespace, device: torch.device) -> Batch:
    """Made pictures and labels, others on every rank."""
    rows = np.arange(options.micro_batch) + local_rank * options.micro_batch
    generator = torch.Generator().manual_seed(local_rank)
    images = torch.randn(len(rows), 3, options.size, options.size, generator=generator).to(device)
    labels = torch.randint(CLASSES, (len(rows),), generator=generator).to(device)
    return Batch(images, labels, rows, rows * 0, rows, rows >= 0)


def start_ranks(measure: Callable[..., None], options: argparse.Namespace) -> Any:
    """Run ``measure(local_rank, port, options, folder, queue)`` on all ranks; what rank 0 puts into the queue."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    port = free_port()
    queue = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = mp.start_processes(
            measure, (port, options, folder, queue), nprocs=options.ranks, start_method="spawn", join=False
        )
        while not ranks.join(timeout=1):
            pass
        return queue.get()
