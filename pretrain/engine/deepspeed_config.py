"""DeepSpeed's configuration: read, merged, checked and made concrete.

``"auto"`` is allowed for the micro-batch and for ``bf16.enabled``; what it became is logged once.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from pretrain.engine.deepspeed_keys import FLOATS, check_keys
from pretrain.engine.optimizers import peak_learning_rate
from pretrain.outcome import UserError, storage_code
from pretrain.recipe import Recipe

Precision = Literal["fp32", "bf16", "fp16", "bf16 autocast"]
"""bf16 and fp16 store and compute in 16 bits, with fp32 masters; autocast stores in fp32 and multiplies in bfloat16."""


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


def input_dtype(precision: Precision) -> torch.dtype:
    """What the network's weights are stored in, and the type in which it takes its images."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


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


def resolve_for(
    recipe: Recipe, config: dict[str, Any], *, world_size: int, has_gpu: bool = False, has_bf16_gpu: bool = False
) -> ResolvedDeepSpeed:
    """Make a configuration, as ``read_deepspeed_config`` returns it, concrete for so many ranks and their device.

    Raises:
        UserError: the global batch is not a multiple of the ranks, batch sizes contradict each other, or stage,
            precision, offloading, optimizer and device do not go together.
    """
    batch, notes = _plan_batch(config, world_size, pairs=recipe.mixing.in_pairs)
    resolved = copy.deepcopy(config)
    resolved |= {
        "train_batch_size": batch.global_batch,
        "train_micro_batch_size_per_gpu": batch.micro_batch,
        "gradient_accumulation_steps": batch.accumulation,
    }
    resolved.setdefault("steps_per_print", 2**31)  # the metrics are ours
    resolved["timers"] = {"throughput": {"enabled": False}}  # it waits for the GPU twice in every micro-batch
    if recipe.optimizer.kind == "sgd":  # DeepSpeed has not tested it; tests/pretrain/test_equality.py has
        resolved.setdefault("zero_allow_untested_optimizer", True)
    zero = resolved.get("zero_optimization", {})
    stage: int = zero.get("stage", 0)
    offloaded = [
        name for name in ("offload_optimizer", "offload_param") if (zero.get(name) or {}).get("device") == "cpu"
    ]
    if "offload_optimizer" in offloaded:
        # torch's fused AdamW is as fast on a CPU as DeepSpeed's and needs no compiler (see docs/training.md).
        resolved.setdefault("zero_force_ds_cpu_optimizer", False)
    if offloaded:
        notes.append(f"{' and '.join(offloaded)}: in the CPU's memory")
    precision, reason = _choose_precision(resolved, stage, has_gpu=has_gpu, has_bf16_gpu=has_bf16_gpu)
    peak, lowest = peak_learning_rate(recipe.optimizer, batch.global_batch)[0], recipe.schedule.min_lr
    if lowest > peak:
        raise UserError(f"schedule.min_lr ({lowest:g}) is above the peak learning rate ({peak:g}): lower it")
    if recipe.optimizer.kind == "lamb" and stage > 0:
        raise UserError(
            f"optimizer.kind lamb at ZeRO stage {stage} is not LAMB, since ZeRO partitions flattened parameters, and "
            "trust ratios are of layers: use zero_optimization.stage 0, or optimizer.kind adamw"
        )
    if "offload_optimizer" in offloaded and stage == 0:
        raise UserError("offload_optimizer needs ZeRO stage 1 or more: set zero_optimization.stage, or leave it out")
    if "offload_param" in offloaded and stage != 3:
        raise UserError("offload_param needs ZeRO stage 3: set zero_optimization.stage to 3, or leave it out")
    return ResolvedDeepSpeed(resolved, batch, stage, precision, (*notes, *reason))


def _check_autocast(section: dict[str, Any]) -> None:
    given = str(section.get("dtype", "bfloat16")).removeprefix("torch.")
    dtype = FLOATS.get(given, given)
    if dtype == "float16":
        raise UserError(
            "torch_autocast with float16 is wrong in DeepSpeed: gradients are clipped while they are scaled, and steps "
            "are skipped without saying so; use dtype bfloat16, or the fp16 section with stage 1 or more"
        )
    if dtype != "bfloat16":
        raise UserError(f"torch_autocast.dtype: bfloat16 is what there is, got {given!r}")
    section["dtype"] = "bfloat16"


def _choose_precision(
    config: dict[str, Any], stage: int, *, has_gpu: bool, has_bf16_gpu: bool
) -> tuple[Precision, list[str]]:
    """The precision, and a line about what ``"auto"`` of bf16 became, which is replaced in ``config``."""
    enabled, reason = _enabled_sections(config, stage, has_gpu=has_gpu, has_bf16_gpu=has_bf16_gpu)
    chosen = enabled[0] if enabled else "fp32"
    if len(enabled) > 1:
        raise UserError(f"{' and '.join(enabled)} are both enabled, and each computes in 16 bits: enable one")
    if chosen == "torch_autocast":
        _check_autocast(config["torch_autocast"])
    if chosen == "bf16" and stage == 0:
        raise UserError(
            "bf16 at ZeRO stage 0 starts with a spurious optimizer step in DeepSpeed: enable torch_autocast with dtype "
            "bfloat16 instead, or use zero_optimization.stage 1 or more"
        )
    if chosen == "fp16" and not has_gpu:
        raise UserError("fp16 needs a GPU, DeepSpeed refuses it on a CPU: use bf16, torch_autocast or fp32 here")
    if chosen == "fp16" and stage == 0:
        raise UserError(
            "fp16 at ZeRO stage 0 keeps fp32 weights where checkpoints cannot find them: use zero_optimization.stage 1 "
            "or more"
        )
    if chosen in ("bf16", "torch_autocast") and has_gpu and not has_bf16_gpu:
        raise UserError(f"{chosen}: this GPU does not compute in bfloat16: enable fp16 instead, or train in fp32")
    summed, own = config.get("data_types", {}).get("grad_accum_dtype"), {"bf16": "bfloat16", "fp16": "float16"}
    if summed is not None and FLOATS.get(summed, summed) not in ("float32", own.get(chosen)):
        raise UserError(f"data_types.grad_accum_dtype {summed!r} does not go with {chosen}: use fp32, or leave it out")
    precision: Any = "bf16 autocast" if chosen == "torch_autocast" else chosen
    return precision, reason


def _enabled_sections(
    config: dict[str, Any], stage: int, *, has_gpu: bool, has_bf16_gpu: bool
) -> tuple[list[str], list[str]]:
    bf16 = config.setdefault("bf16", {"enabled": "auto"})
    enabled = [name for name in ("bf16", "fp16", "torch_autocast") if config.get(name, {}).get("enabled") is True]
    if bf16.get("enabled") != "auto":
        return enabled, []
    bf16["enabled"] = has_bf16_gpu and stage > 0 and not enabled
    if enabled:
        return enabled, []
    if bf16["enabled"]:
        return ["bf16"], ["precision: bf16 (the GPU has it)"]
    why = "there is no GPU"
    if has_bf16_gpu:
        why = "bf16 needs ZeRO stage 1 or more; torch_autocast computes in bfloat16 at stage 0"
    elif has_gpu:
        why = "the GPU does not compute in bfloat16; the fp16 section would be faster"
    return [], [f"precision: fp32 ({why})"]


def _plan_batch(config: dict[str, Any], world_size: int, *, pairs: bool) -> tuple[BatchPlan, list[str]]:
    """The cut of the global batch, whose micro-batches are even where images are mixed in ``pairs``; lines about it."""
    total: Any = config.get("train_batch_size")
    if not _is_count(total):
        raise UserError(f"train_batch_size must be given as a positive number (the global batch), got {total!r}")
    if total % world_size:
        lower = max(ranks for ranks in range(1, world_size) if total % ranks == 0)
        higher = next((ranks for ranks in range(world_size, total) if total % ranks == 0), total)
        raise UserError(
            f"the global batch of {total} (train_batch_size) cannot be divided by {world_size} ranks: start {lower} "
            f"or {higher} ranks, or choose a multiple of {world_size} as train_batch_size"
        )
    per_rank = total // world_size
    limit = config.get("train_micro_batch_size_per_gpu", "auto")
    accumulation = config.get("gradient_accumulation_steps", "auto")
    for name, value in (("train_micro_batch_size_per_gpu", limit), ("gradient_accumulation_steps", accumulation)):
        if value != "auto" and not _is_count(value):
            raise UserError(f'{name} must be a positive number or "auto", got {value!r}')
    if accumulation != "auto":
        micro, rest = divmod(per_rank, accumulation)
        if rest or limit not in ("auto", micro):
            raise UserError(
                f"{world_size} ranks x micro-batch {limit} x accumulation {accumulation} is not the global "
                f"batch of {total}: leave gradient_accumulation_steps out, it follows from the others"
            )
        return BatchPlan(total, micro, accumulation, world_size), []
    ceiling = per_rank if limit == "auto" else min(limit, per_rank)
    micro = max((m for m in range(1 + pairs, ceiling + 1, 1 + pairs) if per_rank % m == 0), default=0)
    if not micro:
        raise UserError(
            f"mixup and CutMix need even micro-batches, but {per_rank} images per rank cannot be cut into any of "
            f"at most {ceiling}: choose another train_batch_size or number of ranks"
        )
    notes = []
    if micro != limit:
        why = "no limit was given" if limit == "auto" else f"largest divisor of {per_rank} up to {limit}"
        why += ", even for mixing" if pairs else ""
        notes.append(f"micro-batch: {micro} per rank, {per_rank // micro} per step ({why})")
    return BatchPlan(total, micro, per_rank // micro, world_size), notes


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else copy.deepcopy(value)
    return merged
