"""What the trainer costs: its whole loop at every ZeRO stage beside a bare torch DDP loop of the same model.

    python -m benchmarks.trainer                                 # lavit_tiny at 96 pixels, 2 ranks, 30 rounds
    python -m benchmarks.trainer --ranks 8 --size 224 --micro-batch 64 --autocast    # on eight GPUs

All variants live in the same processes and take turns, one optimizer step each, on the same fixed batches, so that
whatever else the machine does hits all; before a turn the ranks meet, and then the step is timed. The trainer's side is
`pretrain.train.train` itself, with everything that it does between two steps, but for the loader: that gives the same
tensors again and again. With --compile every stage is measured eager and compiled. Prints a table and adds it to
benchmarks/results/trainer-DATE-MACHINE.md.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from benchmarks.report import RESULTS, add_to_results, processor, today
from data_pipeline.batch import Batch
from pretrain.checkpoints.checkpoint import Progress
from pretrain.checkpoints.pieces import OptimizerPieces
from pretrain.checkpoints.writer import CheckpointWriter, Retention
from pretrain.console import RunConsole
from pretrain.engine.build import build_engine, build_model
from pretrain.engine.deepspeed_config import ResolvedDeepSpeed, resolve_deepspeed_config
from pretrain.engine.distributed import choose_device, has_bf16, init_distributed, new_cpu_group, read_rank
from pretrain.engine.precision import input_dtype
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
from pretrain.train import train

CONFIG = Path(__file__).parent.parent / "ds_config.json"
CLASSES = 1000
BARE = "bare DDP"


@dataclass
class Baton:
    """Lets several loops, each in a thread of its own, take one step at a time, in turn."""

    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    back: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    ended: bool = False
    error: BaseException | None = None

    def turns(self, batch: Batch) -> Iterator[Batch]:
        """The batch, once a turn: the loop that iterates waits here between its steps."""
        while True:
            self.back.release()
            self.go.acquire()
            if self.ended:
                return
            yield batch

    def step(self) -> float:
        """Let the loop take one step; its seconds."""
        began = time.perf_counter()
        self.go.release()
        self.back.acquire()
        if self.error is not None:
            raise self.error
        return time.perf_counter() - began

    def start(self, loop: Callable[[], object]) -> None:
        """Run a loop up to its first turn."""

        def body() -> None:
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


def recipe_of(options: argparse.Namespace, *, compiled: bool) -> Recipe:
    """A recipe as one would pretrain: soft targets, diagonality loss, drop path, decay groups, warm-up."""
    model: dict[str, Any] = {"name": options.model, "overrides": {"drop_path": 0.1}}
    if compiled:
        model["compile"] = True
    return validate_recipe(
        {
            "name": "benchmark",
            "data": {"path": "fixed", "image_size": options.size},
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


def bare_loop(model: torch.nn.Module, batches: Iterator[Batch], *, autocast: bool) -> None:
    """What a person would write without this project: DDP, fused AdamW, clipping."""
    device = next(model.parameters()).device
    spared = model.no_weight_decay()
    groups = [
        {"params": [p for n, p in model.named_parameters() if n not in spared], "weight_decay": 0.05},
        {"params": [p for n, p in model.named_parameters() if n in spared], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    for batch in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            logits, diagonality = ddp(batch.images, with_diagonality=True)
        loss = cross_entropy(logits.float(), batch.labels, label_smoothing=0.1) + 0.01 * diagonality
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def trainer_run(
    recipe: Recipe,
    resolved: ResolvedDeepSpeed,
    batches: Iterator[Batch],
    folder: RunFolder,
    *,
    device: torch.device,
    control: dist.ProcessGroup,
) -> Run:
    """A run as `pretrain.assemble` makes it, but for the data."""
    first = dist.get_rank() == 0
    engine, _ = build_engine(build_model(recipe, CLASSES), recipe, resolved, device)
    folder.path.mkdir(parents=True, exist_ok=True)
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
        train_loader=batches,
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


def measure(local_rank: int, port: int, options: argparse.Namespace, folder: str, queue: Any) -> None:
    """One rank: build all variants, let them take turns, send the seconds of each from rank 0."""
    device, control = become_rank(local_rank, port, options.ranks)
    batch = fixed_batch(local_rank, options, device)
    ours = json.loads(CONFIG.read_text())
    batons: dict[str, Baton] = {BARE: Baton()}
    model = build_model(recipe_of(options, compiled=False), CLASSES).to(device)
    batons[BARE].start(lambda: bare_loop(model, batons[BARE].turns(batch), autocast=options.autocast))
    for compiled, stage in [(c, s) for c in ([False, True] if options.compile else [False]) for s in options.stages]:
        name = f"stage {stage}" + (", compiled" if compiled else "")
        recipe = recipe_of(options, compiled=compiled)
        config = {
            "train_batch_size": options.ranks * options.micro_batch,
            "gradient_clipping": 1.0,
            "zero_optimization": {**ours["zero_optimization"], "stage": stage},
            "torch_autocast": {"enabled": options.autocast},
            "bf16": {"enabled": False},
        }
        resolved = resolve_deepspeed_config(
            config, world_size=options.ranks, has_gpu=device.type == "cuda", has_bf16_gpu=has_bf16(device)
        )
        baton = batons[name] = Baton()
        where = RunFolder(Path(folder) / name)
        run = trainer_run(recipe, resolved, baton.turns(batch), where, device=device, control=control)
        baton.start(lambda run=run: train(run))
    seconds: dict[str, list[float]] = {name: [] for name in batons}
    for turn in range(options.rounds + options.warmup):
        for name, baton in batons.items():
            dist.barrier(control)
            took = baton.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= options.warmup:
                seconds[name].append(took)
    if local_rank == 0:
        queue.put(seconds)
    dist.barrier(control)
    os._exit(0)  # loops and watchdogs are still there


def table(seconds: dict[str, list[float]]) -> list[str]:
    """Median step, spread between quartiles, and the median over the rounds of the ratio to the bare loop."""
    lines = ["| variant | step, ms | quartiles | time over bare DDP | quartiles |", "|---|---|---|---|---|"]
    for name, times in seconds.items():
        ratios = [mine / bare for mine, bare in zip(times, seconds[BARE], strict=True)]
        (low, middle, high), (least, ratio, most) = (statistics.quantiles(x, n=4) for x in (times, ratios))
        lines.append(
            f"| {name} | {1e3 * middle:.1f} | {1e3 * low:.1f} to {1e3 * high:.1f} | {ratio:.3f} | "
            f"{least:.3f} to {most:.3f} |"
        )
    return lines


def tell(what: str, lines: list[str], results: Path) -> None:
    """Print a result and add it, with date, machine and version above it, to ``results/WHAT-DATE-MACHINE.md``."""
    lines = [f"## {processor()}, {os.cpu_count()} cores, torch {torch.__version__}, {today()}", "", *lines]
    print("\n".join(lines))  # noqa: T201  the table is what this command is for
    add_to_results(what, processor(), lines, results)


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    """Measure, print, and add to the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="lavit_tiny")
    parser.add_argument("--size", type=int, default=96, help="side of the pictures in pixels (default: 96)")
    parser.add_argument("--micro-batch", type=int, default=8, help="pictures per rank and step (default: 8)")
    parser.add_argument("--ranks", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], help="ZeRO stages (default: all)")
    parser.add_argument("--rounds", type=int, default=30, help="steps to take the median of (default: 30)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them (default: 3)")
    parser.add_argument("--autocast", action="store_true", help="in bfloat16 autocast instead of fp32")
    parser.add_argument("--compile", action="store_true", help="also with model.compile")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the table")
    options = parser.parse_args(arguments)
    seconds = start_ranks(measure, options)
    device = f"{options.ranks} GPUs" if torch.cuda.is_available() else f"{options.ranks} ranks of one thread each"
    lines = [
        " ".join(
            [
                f"`python -m benchmarks.trainer {' '.join(sys.argv[1:] if arguments is None else arguments)}`:",
                f"{options.model} at {options.size} x {options.size}, {options.micro_batch} pictures a rank, {device},",
                f"{'bfloat16 autocast' if options.autocast else 'fp32'}, {options.rounds} interleaved rounds;",
                "ds_config.json but for the stage.",
            ]
        ),
        "",
        *table(seconds),
    ]
    tell("trainer", lines, options.results)
    return seconds


if __name__ == "__main__":
    main()
