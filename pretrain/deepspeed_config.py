"""DeepSpeed's configuration: read, merged, checked and made concrete.

DeepSpeed ignores unknown top-level keys and raises far from the cause on others, so every key is checked here first.
``"auto"`` is allowed for the micro-batch and for ``bf16.enabled``; what it became is printed once.
"""

import copy
import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pretrain.outcome import UserError

ALLOWED = frozenset(
    {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "zero_optimization",
        "zero_allow_untested_optimizer",
        "bf16",
        "communication_data_type",
        "prescale_gradients",
        "gradient_predivide_factor",
        "data_types",
        "steps_per_print",
        "wall_clock_breakdown",
        "dump_state",
        "comms_logger",
        "flops_profiler",
        "memory_breakdown",
        "disable_allgather",
    }
)

REFUSED = {
    "optimizer": "the optimizer is the recipe's: set optimizer.* there",
    "scheduler": "the schedule is the recipe's: set schedule.* there",
    "activation_checkpointing": "it steers DeepSpeed's own checkpointing, which this model does not use: set "
    "model.activation_checkpointing in the recipe",
    "fp16": "fp16 is not supported yet: use bf16",
    "torch_autocast": "torch_autocast is not supported yet: use bf16",
    "amp": "apex.amp was removed from DeepSpeed and apex: use bf16",
    "checkpoint": "checkpoints are written by this project: set checkpoint.* in the recipe",
    "tensorboard": "TensorBoard is always written to the run's folder",
    "csv_monitor": "metrics.jsonl is always written to the run's folder",
    "nebula": "it was removed from DeepSpeed",
    "elasticity": "it was removed from DeepSpeed; any run here resumes with another number of GPUs",
    "curriculum_learning": "it was removed from DeepSpeed",
}

# Fields of sections: the values that are allowed, and why no others.
REFUSED_WITHIN: dict[str, tuple[tuple[Any, ...], str]] = {
    "offload_optimizer": ((None,), "offloading is not supported yet: leave it out, or use a higher ZeRO stage"),
    "offload_param": ((None,), "offloading is not supported yet: leave it out"),
    "check_grad_overflow": ((True,), "it must stay true, or steps with gradients that are not finite are not skipped"),
    "compute_grad_norm": ((True,), "it must stay true, or steps with gradients that are not finite are not skipped"),
}


@dataclass(frozen=True)
class BatchPlan:
    """How the global batch is cut: ``global_batch = world_size * micro_batch * accumulation`` pictures."""

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
    precision: str
    notes: tuple[str, ...]
    """What was chosen automatically, with the reason; one line each."""


def read_deepspeed_config(path: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """Read the JSON file, lay the recipe's ``deepspeed`` section over it, and check every key.

    Raises:
        UserError: unreadable, not JSON, or keys that DeepSpeed or this project would not honour.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such DeepSpeed configuration; name one with --deepspeed_config") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a DeepSpeed configuration is a JSON object, this is a {type(content).__name__}")
    merged = _merge(content, overrides)
    for key in merged:
        if key in REFUSED:
            raise UserError(f"{path}: {key}: {REFUSED[key]}")
        if key not in ALLOWED:
            near = difflib.get_close_matches(key, ALLOWED, n=1)
            raise UserError(f"{path}: unknown DeepSpeed key {key}" + (f" (did you mean {near[0]}?)" if near else ""))
    if "gradient_clipping" not in merged:
        raise UserError(f"{path}: write gradient_clipping (0.0 is off): DeepSpeed would silently clip at 1.0")
    _check_sections(merged, path)
    return merged


def resolve_deepspeed_config(
    config: dict[str, Any], *, world_size: int, has_bf16_gpu: bool, pairs: bool = False
) -> ResolvedDeepSpeed:
    """Make a checked configuration concrete for this world size and device.

    Args:
        config: what ``read_deepspeed_config`` returned.
        world_size: number of ranks.
        has_bf16_gpu: whether the device is a GPU that computes in bfloat16.
        pairs: whether micro-batches must be even, because images are mixed in pairs.

    Raises:
        UserError: the global batch is not a multiple of the ranks, or batch sizes contradict each other.
    """
    batch, notes = _plan_batch(config, world_size, pairs=pairs)
    resolved = copy.deepcopy(config)
    resolved |= {
        "train_batch_size": batch.global_batch,
        "train_micro_batch_size_per_gpu": batch.micro_batch,
        "gradient_accumulation_steps": batch.accumulation,
    }
    resolved.setdefault("steps_per_print", 2**31)  # the metrics are ours
    stage = resolved.get("zero_optimization", {}).get("stage", 0)
    bf16 = resolved.setdefault("bf16", {"enabled": "auto"})
    if bf16.get("enabled", False) == "auto":
        bf16["enabled"] = has_bf16_gpu and stage > 0
        reason = "no GPU that computes in bf16" if not has_bf16_gpu else "bf16 wants ZeRO stage 1 or more"
        notes.append("precision: bf16 (the GPU has it)" if bf16["enabled"] else f"precision: fp32 ({reason})")
    elif bf16.get("enabled", False) and stage == 0:
        raise UserError(
            "bf16 at ZeRO stage 0 starts with a spurious optimizer step in DeepSpeed: "
            "use zero_optimization.stage 1 or more, or bf16.enabled false"
        )
    precision = "bf16" if bf16.get("enabled", False) else "fp32"
    return ResolvedDeepSpeed(resolved, batch, stage, precision, tuple(notes))


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


def _check_sections(config: dict[str, Any], path: Path) -> None:
    # Imported here: DeepSpeed takes seconds to import, and --help should not.
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config  # noqa: PLC0415
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # noqa: PLC0415

    for name, schema in (("zero_optimization", DeepSpeedZeroConfig), ("bf16", DeepSpeedBF16Config)):
        section = config.get(name, {})
        if not isinstance(section, dict):
            raise UserError(f"{path}: {name} is a section, such as {{}}, got {section!r}")
        for key, (allowed, why) in REFUSED_WITHIN.items():
            if key in section and section[key] not in allowed:
                raise UserError(f"{path}: {name}.{key}: {why}")
        section = dict(section)
        if name == "bf16" and section.get("enabled") == "auto":
            section["enabled"] = False
        try:
            schema(**section)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join([name, *(str(part) for part in first["loc"])])
            raise UserError(f"{path}: {key}: {first['msg']}, got {first['input']!r}") from None
