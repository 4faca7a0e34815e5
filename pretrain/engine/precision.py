"""What the engine computes in: fp32, bf16, fp16, or torch's autocast to bfloat16; and what cannot go together."""

from typing import Any, Literal

import torch

from pretrain.engine.deepspeed_keys import FLOATS
from pretrain.outcome import UserError

Precision = Literal["fp32", "bf16", "fp16", "bf16 autocast"]


def choose_precision(
    config: dict[str, Any], *, stage: int, has_gpu: bool, has_bf16_gpu: bool
) -> tuple[Precision, list[str]]:
    """Decide which of ``bf16``, ``fp16`` and ``torch_autocast`` a checked configuration has, in place.

    ``bf16`` and ``fp16`` store and compute the model in 16 bits with fp32 masters; ``torch_autocast`` keeps its
    weights in fp32 and computes matrix products and convolutions in bfloat16. ``bf16.enabled`` may be ``"auto"``.

    Returns:
        the precision, and lines about what was chosen automatically.

    Raises:
        UserError: two of them are enabled, or a combination that DeepSpeed gets wrong or the device cannot do; with the
            way out.
    """
    bf16 = config.setdefault("bf16", {"enabled": "auto"})
    on = [name for name in ("bf16", "fp16", "torch_autocast") if config.get(name, {}).get("enabled") is True]
    if len(on) > 1:
        raise UserError(f"{' and '.join(on)} are both enabled, but each is a way to compute in 16 bits: enable one")
    notes: list[str] = []
    if bf16.get("enabled") == "auto":
        bf16["enabled"] = has_bf16_gpu and stage != 0 and not on
        if bf16["enabled"]:
            notes.append("precision: bf16 (the GPU has it)")
        elif not on:
            notes.append("precision: fp32 (" + _why_not_bf16(has_gpu=has_gpu, has_bf16_gpu=has_bf16_gpu) + ")")
    precision: Precision = "bf16" if bf16.get("enabled") else "fp32"
    if on == ["torch_autocast"]:
        precision = "bf16 autocast"
        _check_autocast(config["torch_autocast"], stage)
    elif on == ["fp16"]:
        precision = "fp16"
        _check_fp16(stage, has_gpu=has_gpu)
    elif precision == "bf16" and stage == 0:
        raise UserError(
            "bf16 at ZeRO stage 0 starts with a spurious optimizer step in DeepSpeed: enable torch_autocast with dtype "
            "bfloat16 instead, or use zero_optimization.stage 1 or more"
        )
    if precision in ("bf16", "bf16 autocast") and has_gpu and not has_bf16_gpu:
        raise UserError(f"{on[0]}: this GPU does not compute in bfloat16: enable fp16 instead, or train in fp32")
    given = config.get("data_types", {}).get("grad_accum_dtype")
    own = {"bf16": "bfloat16", "fp16": "float16"}.get(precision, "float32")
    if given is not None and FLOATS.get(given, given) not in ("float32", own):
        raise UserError(
            f"data_types.grad_accum_dtype {given!r} does not go with {precision}: use fp32, or leave it out for {own}"
        )
    return precision, notes


def _why_not_bf16(*, has_gpu: bool, has_bf16_gpu: bool) -> str:
    if has_bf16_gpu:
        return "bf16 needs ZeRO stage 1 or more; torch_autocast computes in bfloat16 at stage 0"
    return "the GPU does not compute in bfloat16; the fp16 section would be faster" if has_gpu else "there is no GPU"


def _check_fp16(stage: int, *, has_gpu: bool) -> None:
    if not has_gpu:
        raise UserError("fp16 needs a GPU, DeepSpeed refuses it on a CPU: use bf16, torch_autocast or fp32 here")
    if stage == 0:
        raise UserError(
            "fp16 at ZeRO stage 0 keeps fp32 weights where checkpoints cannot find them: use zero_optimization.stage 1 "
            "or more"
        )


def _check_autocast(section: dict[str, Any], stage: int) -> None:
    given = str(section.get("dtype", "bfloat16")).removeprefix("torch.")
    dtype = FLOATS.get(given, given)
    if dtype == "float16":
        why = (
            "its loss scale never falls again after an overflow, and gradients are clipped while they are scaled"
            if stage
            else "its loss scaler skips steps without saying so, so that non-finite gradients would go unnoticed"
        )
        raise UserError(
            f"torch_autocast with float16 at ZeRO stage {stage} is wrong in DeepSpeed: {why}; use dtype bfloat16, or "
            "the fp16 section with stage 1 or more"
        )
    if dtype != "bfloat16":
        raise UserError(f"torch_autocast.dtype: bfloat16 is what there is, got {given!r}")
    section["dtype"] = "bfloat16"


def input_dtype(precision: Precision) -> torch.dtype:
    """What the network's weights are stored in, and the type in which it takes its images."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
