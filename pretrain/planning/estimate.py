"""A plan: everything that can be said of a run before it starts, each number with what it rests on."""

import copy
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from models.config import LaViTConfig
from models.cost import count_macs, count_parameters
from pretrain.check import architecture, checkpoint_bytes, resolve_for
from pretrain.devices import Device
from pretrain.engine.deepspeed_config import BatchPlan, ResolvedDeepSpeed
from pretrain.engine.precision import Precision, input_dtype
from pretrain.engine.schedule import count_steps
from pretrain.monitoring.efficiency import model_flops_per_image
from pretrain.outcome import UserError
from pretrain.planning.data import Data, look_at_data, measure_storage
from pretrain.planning.failures import Conditions, Finish, best_interval, expected_finish, job_mtbf, simulate
from pretrain.planning.memory import Engine, Memory, MemoryModel, memory_model
from pretrain.planning.rehearsal import Policy
from pretrain.planning.scaling import GPUS, Network, Reading, Step, simulate_step
from pretrain.planning.speed import Speed, Training, read_benchmark, speed_of
from pretrain.recipe import Recipe

POLICIES: dict[str, Policy] = {
    "none": "none",
    "stage 1": (True, False, False, False),
    "stages 1-2": (True, True, False, False),
    "stages 1-3": (True, True, True, False),
    "all": "all",
}
"""Stages whose activations are recomputed; the first stages keep most of them."""


@dataclass(frozen=True)
class Request:
    """What the command line says; ``None`` where it says nothing."""

    recipe: Recipe
    deepspeed: dict[str, Any]
    """Merged and checked, not yet resolved."""
    gpus: int
    device: Device
    gpus_per_node: int = 8
    images: int | None = None
    classes: int | None = None
    bytes_per_image: float | None = None
    benchmark: Path | None = None
    mfu: float | None = None
    headroom: float = 0.1
    """Share of a GPU's memory that is kept free."""
    storage: float | None = None
    """Bytes per second for all GPUs together."""
    measure_storage: bool = False
    mtbf_hours_per_gpu: float = 50_000.0
    restart_minutes: float = 10.0
    save_seconds: float = 1.0
    node_gbit: float = 400.0
    simulate_failures: bool = False


@dataclass(frozen=True)
class Row:
    """Memory of one GPU at one ZeRO stage and policy of recomputation."""

    stage: int
    policy: str
    precision: Precision
    memory: Memory
    fits: bool
    largest: int
    """The largest micro-batch that fits."""
    chosen: bool
    """Whether the recipe says so."""


@dataclass(frozen=True)
class Checkpoints:
    """Seconds, where nothing else is said."""

    bytes: int
    every_steps: int
    mtbf: float
    best: float
    """Young and Daly's interval."""
    best_steps: int | None
    """The same in steps; None without a speed."""


@dataclass(frozen=True)
class Outlook:
    """How a run with failures ends, for one distance between checkpoints; hours."""

    what: str
    every_steps: int
    expected: float
    simulated: Finish


@dataclass(frozen=True)
class Estimate:
    """The whole plan."""

    request: Request
    parameters: int
    macs: int
    data: Data
    batch: BatchPlan
    steps: int
    precision: Precision
    stage: int
    notes: tuple[str, ...]
    """What was chosen automatically, with the reason, as training prints it."""
    rows: tuple[Row, ...]
    refused: tuple[str, ...]
    """Stages that cannot be had with this configuration, and why."""
    capacity: float
    speed: Speed
    storage: float | None
    storage_from: str
    checkpoints: Checkpoints
    scaling: tuple[Step, ...]
    """Steps on other numbers of GPUs; none without a speed."""

    @property
    def images_seen(self) -> float:
        """Over the whole run."""
        return float(self.steps * self.batch.global_batch)

    def hours_at(self, per_gpu: float) -> float:
        """Wall-clock hours of training at so many images per second and GPU."""
        return self.images_seen / (per_gpu * self.batch.world_size) / 3600

    @property
    def chosen(self) -> Row | None:
        """What the recipe says; None where it is none of the rows."""
        return next((row for row in self.rows if row.chosen), None)


def make_estimate(request: Request) -> Estimate:
    """Work everything out; takes some seconds.

    Raises:
        UserError: what is wrong, in one line.
    """
    recipe = request.recipe
    data = look_at_data(recipe, request.images, request.classes, request.bytes_per_image)
    config = architecture(recipe, data.classes)
    parameters, macs = count_parameters(config), count_macs(config)
    resolved = _resolve(request, request.deepspeed, parameters)
    batch = resolved.batch
    capacity = request.device.memory * (1 - request.headroom)
    rows, refused = _memory_rows(request, config, resolved.stage, capacity)
    measured = None
    if request.benchmark is not None:
        stages = enumerate(_as_booleans(recipe.model.activation_checkpointing), 1)
        recomputed = tuple(stage for stage, again in stages if again)
        wanted = Training(config, recipe.model.compile, resolved.precision, batch.micro_batch, recomputed)
        measured = read_benchmark(request.benchmark, request.device, wanted)
    dtype = torch.bfloat16 if resolved.precision == "bf16 autocast" else input_dtype(resolved.precision)
    how_fast = speed_of(
        request.device.peak(dtype),
        model_flops_per_image(macs),
        measured,
        request.mfu,
    )
    storage, storage_from = request.storage, "given with --storage"
    if request.measure_storage:
        storage, storage_from = measure_storage(recipe), "measured: one reader of this machine"
    steps = count_steps(recipe.schedule, epoch_size=data.images, global_batch=batch.global_batch)
    return Estimate(
        request, parameters, macs, data, batch, steps, resolved.precision, resolved.stage, resolved.notes, rows,
        refused, capacity, how_fast, storage, storage_from if storage else "not known",
        _checkpoints(request, parameters, batch, how_fast),
        _scaling(request, resolved, parameters, how_fast, Reading(storage, data.bytes_per_image)),
    )  # fmt: skip


def with_failures(estimate: Estimate) -> tuple[Outlook, ...]:
    """Play the run through with failures, at the recipe's distance between checkpoints and at others.

    Raises:
        UserError: nothing is known of the speed, so that there is no time in which anything could fail.
    """
    request, points = estimate.request, estimate.checkpoints
    believed = estimate.speed.believed
    if believed is None:
        raise UserError(
            "--simulate-failures needs a speed: give --benchmark FILE, or --mfu to assume a share of the peak"
        )
    step = estimate.batch.global_batch / (believed * estimate.batch.world_size)
    conditions = Conditions(
        3600 * estimate.hours_at(believed), request.save_seconds, 60 * request.restart_minutes, points.mtbf
    )
    best = max(1, points.best_steps or 1)
    distances = {"the recipe's": points.every_steps, "Young-Daly": best, "half of it": max(1, best // 2)}
    distances |= {"twice": 2 * best, "ten times": 10 * best}
    outlooks = []
    for what, every in distances.items():
        interval = every * step
        try:
            expected = expected_finish(conditions, interval)
        except OverflowError:
            raise UserError(
                f"checkpoints each {every} steps ({interval / 3600:.3g} h) and failures each "
                f"{points.mtbf / 3600:.3g} h: such a run never ends; lower checkpoint.every_steps"
            ) from None
        outlooks.append(Outlook(what, every, expected / 3600, simulate(conditions, interval)))
    return tuple(outlooks)


def _resolve(request: Request, config: dict[str, Any], parameters: int) -> ResolvedDeepSpeed:
    return resolve_for(
        request.recipe, config, parameters=parameters, world_size=request.gpus, has_gpu=True, has_bf16_gpu=True
    )


def _memory_rows(
    request: Request, config: LaViTConfig, chosen_stage: int, capacity: float
) -> tuple[tuple[Row, ...], tuple[str, ...]]:
    recipe, parameters, rows, refused = request.recipe, count_parameters(config), [], []
    models: dict[Precision, MemoryModel] = {}
    own = recipe.model.activation_checkpointing
    policies = dict(POLICIES)
    if _as_booleans(own) not in [_as_booleans(policy) for policy in policies.values()]:
        policies["the recipe's"] = own
    for stage in range(4):
        changed = copy.deepcopy(request.deepspeed)
        changed.setdefault("zero_optimization", {})["stage"] = stage
        try:
            resolved = _resolve(request, changed, parameters)
        except UserError as error:
            refused.append(f"ZeRO {stage}: {error}")
            continue
        if resolved.precision not in models:
            mixed = recipe.mixing.in_pairs
            models[resolved.precision] = memory_model(config, resolved.precision, mixed=mixed, gpu=True)
        model, engine, batch = models[resolved.precision], Engine.of(recipe, resolved), resolved.batch
        ahead = recipe.data.prefetch * 4 * config.in_channels * config.image_size[0] * config.image_size[1]
        for name, policy in policies.items():
            memory = model.memory(engine, policy, batch.micro_batch, ahead=ahead)
            step = 2 if recipe.mixing.in_pairs else 1
            limit = batch.global_batch // batch.world_size
            largest = model.largest(engine, policy, capacity, limit=limit, step=step, ahead=ahead)
            chosen = stage == chosen_stage and _as_booleans(policy) == _as_booleans(own)
            fits = memory.total <= capacity
            rows.append(Row(stage, name, resolved.precision, memory, fits, largest, chosen))
    return tuple(rows), tuple(refused)


def _checkpoints(request: Request, parameters: int, batch: BatchPlan, how_fast: Speed) -> Checkpoints:
    mtbf = 3600 * job_mtbf(request.gpus, request.mtbf_hours_per_gpu)
    best = best_interval(request.save_seconds, mtbf)
    steps = None
    if how_fast.believed is not None:
        step = batch.global_batch / (how_fast.believed * batch.world_size)
        steps = max(1, round(best / step))
    size = checkpoint_bytes(request.recipe, parameters)
    return Checkpoints(size, request.recipe.checkpoint.every_steps, mtbf, best, steps)


def _scaling(
    request: Request, resolved: ResolvedDeepSpeed, parameters: int, speed: Speed, reading: Reading
) -> tuple[Step, ...]:
    if speed.believed is None:
        return ()
    network = Network(request.device.link, request.node_gbit * 1e9 / 8, request.gpus_per_node)
    engine, batch = Engine.of(request.recipe, resolved), resolved.batch
    work = (batch.global_batch, speed.believed)

    def on(gpus: int) -> Step:  # with the planned micro-batch, as far as there are pictures for it
        accumulation = math.ceil(batch.global_batch / gpus / batch.micro_batch)
        there = dataclasses.replace(engine, accumulation=accumulation)
        return simulate_step(gpus, there, network, reading, parameters=parameters, work=work)

    return tuple(on(gpus) for gpus in sorted({*(n for n in GPUS if n <= batch.global_batch), request.gpus}))


def _as_booleans(policy: Policy) -> tuple[bool, ...]:
    return (policy == "all",) * 4 if isinstance(policy, str) else tuple(policy)
