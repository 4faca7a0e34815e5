"""DeepSpeed's configuration: read, merged, checked and made concrete.

``"auto"`` is allowed for the micro-batch and for ``bf16.enabled``; what it became is logged once.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.engine.deepspeed_keys import check_keys
from pretrain.engine.precision import Precision, choose_precision
from pretrain.outcome import UserError, storage_code


@dataclass(frozen=True)
class BatchPlan:
    """How the global batch is cut: ``global_batch = world_size * micro_batch * accumulation`` images."""

    global_batch: int
    micro_batch: int
    accumulation: int
    world_size: int


@dataclass(frozen=True)
class ResolvedDeepSpeed:
    """A configuration with nothing left open, as it is handed to ``deepspeed.initialize``."""

    config: dict[str, Any]
    batch: BatchPlan
    stage: int
    precision: Precision
    notes: tuple[str, ...]
    """What was chosen automatically, with the reason; one line each."""


def read_deepspeed_config(
    path: Path, overrides: dict[str, Any], *, recorded_stage: int | None = None
) -> dict[str, Any]:
    """Read the JSON file, lay the recipe's ``deepspeed`` section over it, and check every key.

    ``recorded_stage``, of the run to resume, stands in for ``"stage": "auto"``, which older versions had.

    Raises:
        UserError: unreadable, not JSON, or keys that DeepSpeed or this project would not honor.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such DeepSpeed configuration; name one with --deepspeed_config") from None
    except (OSError, ValueError, RecursionError) as error:
        code = storage_code(error) if isinstance(error, OSError) else None
        raise UserError(f"{path}: not readable as JSON: {error}", code) from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a DeepSpeed configuration is a JSON object, this is a {type(content).__name__}")
    merged = _merge(content, overrides)
    zero = merged.get("zero_optimization")
    if recorded_stage is not None and isinstance(zero, dict) and zero.get("stage") == "auto":
        zero["stage"] = recorded_stage
    check_keys(merged, str(path))
    return merged


def resolve_deepspeed_config(
    config: dict[str, Any],
    *,
    world_size: int,
    has_bf16_gpu: bool,
    has_gpu: bool | None = None,
    pairs: bool = False,
    optimizer: str = "adamw",
) -> ResolvedDeepSpeed:
    """Make a checked configuration concrete for this world size and device.

    Args:
        config: what ``read_deepspeed_config`` returned.
        world_size: number of ranks.
        has_bf16_gpu: whether the device is a GPU that computes in bfloat16.
        has_gpu: whether the device is a GPU at all; as ``has_bf16_gpu`` where not given.
        pairs: whether micro-batches must be even, because images are mixed in pairs.
        optimizer: ``optimizer.kind`` of the recipe.

    Raises:
        UserError: the global batch is not a multiple of the ranks, batch sizes contradict each other, or stage,
            precision, offloading, optimizer and device do not go together.
    """
    batch, notes = _plan_batch(config, world_size, pairs=pairs)
    resolved = copy.deepcopy(config)
    resolved |= {
        "train_batch_size": batch.global_batch,
        "train_micro_batch_size_per_gpu": batch.micro_batch,
        "gradient_accumulation_steps": batch.accumulation,
    }
    resolved.setdefault("steps_per_print", 2**31)  # the metrics are ours
    resolved["timers"] = {"throughput": {"enabled": False}}  # it waits for the GPU twice in every micro-batch
    stage: int = resolved.get("zero_optimization", {}).get("stage", 0)
    has_gpu = has_bf16_gpu if has_gpu is None else has_gpu
    precision, why = choose_precision(resolved, stage=stage, has_gpu=has_gpu, has_bf16_gpu=has_bf16_gpu)
    _check_optimizer(resolved, stage, optimizer)
    notes += [*why, *_check_offload(resolved, stage)]
    return ResolvedDeepSpeed(resolved, batch, stage, precision, tuple(notes))


def _check_optimizer(config: dict[str, Any], stage: int, optimizer: str) -> None:
    if optimizer == "lamb" and stage > 0:
        raise UserError(
            f"optimizer.kind lamb at ZeRO stage {stage} is not LAMB: ZeRO partitions the flattened parameters, and "
            "the trust ratio would be one per partition, not one per layer; use zero_optimization.stage 0, or "
            "optimizer.kind adamw"
        )
    if optimizer == "sgd":  # DeepSpeed has not tested it; tests/pretrain/test_equality.py has
        config.setdefault("zero_allow_untested_optimizer", True)


def _check_offload(config: dict[str, Any], stage: int) -> list[str]:
    zero = config.get("zero_optimization", {})
    on = [name for name in ("offload_optimizer", "offload_param") if (zero.get(name) or {}).get("device") == "cpu"]
    if "offload_optimizer" in on and stage == 0:
        raise UserError("offload_optimizer needs ZeRO stage 1 or more: set zero_optimization.stage, or leave it out")
    if "offload_param" in on and stage != 3:
        raise UserError("offload_param needs ZeRO stage 3: set zero_optimization.stage to 3, or leave it out")
    if "offload_optimizer" in on:
        # torch's fused AdamW is as fast on a CPU as DeepSpeed's and needs no compiler (see docs/training.md).
        config.setdefault("zero_force_ds_cpu_optimizer", False)
    return [f"{' and '.join(on)}: in the CPU's memory"] if on else []


def _plan_batch(config: dict[str, Any], world_size: int, *, pairs: bool) -> tuple[BatchPlan, list[str]]:
    total = config.get("train_batch_size")
    if not isinstance(total, int) or isinstance(total, bool) or total < 1:
        raise UserError(f"train_batch_size must be given as a positive number (the global batch), got {total!r}")
    if total % world_size:
        divisors = [w for w in range(1, total + 1) if total % w == 0]
        lower = max((w for w in divisors if w < world_size), default=1)
        higher = min((w for w in divisors if w > world_size), default=total)
        raise UserError(
            f"the global batch of {total} (train_batch_size) cannot be divided by {world_size} ranks: "
            f"start {lower} or {higher} ranks, or choose a multiple of {world_size} as train_batch_size"
        )
    per_rank = total // world_size
    limit = config.get("train_micro_batch_size_per_gpu", "auto")
    accumulation = config.get("gradient_accumulation_steps", "auto")
    notes: list[str] = []
    for name, value in (("train_micro_batch_size_per_gpu", limit), ("gradient_accumulation_steps", accumulation)):
        if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UserError(f'{name} must be a positive number or "auto", got {value!r}')
    if accumulation != "auto":
        if per_rank % accumulation or limit not in ("auto", per_rank // accumulation):
            raise UserError(
                f"{world_size} ranks x micro-batch {limit} x accumulation {accumulation} is not the global "
                f"batch of {total}: leave gradient_accumulation_steps out, it follows from the others"
            )
        micro = per_rank // accumulation
    else:
        ceiling = per_rank if limit == "auto" else min(limit, per_rank)
        step = 2 if pairs else 1
        fitting = [m for m in range(ceiling, 0, -1) if per_rank % m == 0 and m % step == 0]
        if not fitting:
            raise UserError(
                f"mixup and CutMix need even micro-batches, but {per_rank} images per rank cannot be cut into any of "
                f"at most {ceiling}: choose another train_batch_size or number of ranks"
            )
        micro = fitting[0]
        if micro != limit:
            why = f"largest divisor of {per_rank} up to {limit}" if limit != "auto" else "no limit was given"
            why += ", even for mixing" if pairs else ""
            notes.append(f"micro-batch: {micro} per rank, {per_rank // micro} per step ({why})")
    return BatchPlan(total, micro, per_rank // micro, world_size), notes


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged
