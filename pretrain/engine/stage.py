"""Which ZeRO stage a run has, where ``zero_optimization.stage`` is ``"auto"``: 0 or 1, decided before it starts."""

from typing import Any

from pretrain.engine.precision import Precision
from pretrain.outcome import UserError

WHOLE_BYTES = 2**30
"""The most of moments and moving average that a rank keeps whole where it could be divided among the ranks.

Chosen, not measured: LaViT-B with AdamW and an average stays below (0.6 GiB), LaViT-L does not (1.5 GiB without one).
"""


def fixed_stage(config: dict[str, Any], optimizer: str) -> int | None:
    """The stage that a checked configuration names or that the optimizer must have; None where it is to be chosen."""
    stage: int | str = config.get("zero_optimization", {}).get("stage", 0)
    if isinstance(stage, int):
        return stage
    return 0 if optimizer == "lamb" else None


def choose_stage(
    config: dict[str, Any], *, precision: Precision, optimizer: str, state_bytes: int, world_size: int
) -> tuple[int, list[str]]:
    """Settle ``zero_optimization.stage`` of a checked configuration in place.

    The choice rests on nothing that changes when a job is started again on as many ranks. Stage 1 costs a gathering of
    all weights a step and divides the optimizer's state, so it is taken where something needs it or the state is large.

    Args:
        config: with its precision settled.
        precision: what the engine computes in.
        optimizer: ``optimizer.kind`` of the recipe.
        state_bytes: moments of the optimizer and moving average of the whole network.
        world_size: number of ranks.

    Returns:
        the stage, and a line about why it was chosen, if it was.

    Raises:
        UserError: the optimizer needs another stage than the rest.
    """
    zero = config.get("zero_optimization", {})
    fixed = fixed_stage(config, optimizer)
    if fixed is not None and zero.get("stage") != "auto":
        return fixed, []
    needs = [f"weights in {precision}"] if precision in ("bf16", "fp16") else []
    needs += ["offload_optimizer"] if (zero.get("offload_optimizer") or {}).get("device") == "cpu" else []
    if needs and fixed is not None:
        raise UserError(
            f"no ZeRO stage goes with both optimizer.kind {optimizer}, which needs stage {fixed}, and "
            f"{' and '.join(needs)}, which needs stage 1: use torch_autocast instead of bf16 or fp16, leave "
            "offload_optimizer out, or use optimizer.kind adamw"
        )
    size = f"moments and moving average take {state_bytes / 2**20:,.1f} MiB"
    if needs:
        stage, why = 1, f"needed by {' and '.join(needs)}"
    elif fixed is not None:
        stage, why = fixed, f"needed by {optimizer.upper()}, whose layers ZeRO would cut"
    elif world_size == 1:
        stage, why = 0, "one rank has nothing to divide"
    elif state_bytes <= WHOLE_BYTES:
        stage, why = 0, f"{size}; up to {WHOLE_BYTES // 2**20:,} every rank keeps all of it"
    else:
        stage, why = 1, f"{size}; more than {WHOLE_BYTES // 2**20:,} is divided among the ranks"
    zero["stage"] = stage
    return stage, [f"ZeRO stage: {stage} ({why})"]
