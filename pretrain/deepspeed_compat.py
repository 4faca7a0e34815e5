"""Every use of DeepSpeed's private attributes, and every function of it that is replaced, for the pinned version."""

import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from pretrain.outcome import UserError

VERSION = "0.19.8"
SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What changes in DeepSpeed's ``DynamicLossScaler`` from step to step."""


def check_version() -> None:
    """Raise a UserError for another version of DeepSpeed than the one whose internals are used here."""
    import deepspeed  # noqa: PLC0415 - slow to import, and reads the environment that distributed.py sets

    installed = deepspeed.__version__.split("+")[0]
    if installed != VERSION:
        raise UserError(
            f"DeepSpeed {installed} is installed, but checkpoints read internals of {VERSION}: "
            f"pip install deepspeed=={VERSION}"
        )


def skip_op_compilation() -> None:
    """Keep DeepSpeed from compiling kernels: on a CPU a shared-memory all-reduce, a minute on every rank.

    Muon, which no recipe can ask for, is replaced by an empty class: ZeRO imports it to compare the optimizer with it,
    and with it come torch._dynamo and torch._inductor, seconds on every rank.
    """
    import deepspeed  # noqa: PLC0415 - slow to import

    deepspeed.ops.__compatible_ops__ = {}
    muon = ModuleType("deepspeed.runtime.zero.muon.original_muon")
    vars(muon).update(MuonWithAuxAdam=type("MuonWithAuxAdam", (), {}), adam_update=None, muon_update=None)
    sys.modules.setdefault(muon.__name__, muon)


def zero_optimizer(engine: Any) -> Any:
    """DeepSpeed's ZeRO optimizer of an engine; None at stage 0."""
    return engine.optimizer if engine.zero_optimization_stage() else None


def torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer that steps the partitions."""
    zero = zero_optimizer(engine)
    optimizer: torch.optim.Optimizer = engine.optimizer if zero is None else zero.optimizer
    return optimizer


def record_gradient_norm(engine: Any) -> None:
    """At stage 0, let clipping keep the norm of the gradient, which decides whether a step is skipped.

    DeepSpeed's own clips parameter by parameter and forgets the norm.
    """
    if engine.zero_optimization_stage():
        return
    parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]

    def clip() -> None:
        engine._global_grad_norm = torch.nn.utils.clip_grad_norm_(  # noqa: SLF001
            parameters, engine.gradient_clipping(), foreach=True
        )

    engine.clip_fp32_gradients = clip


def gradient_norm(engine: Any) -> torch.Tensor:
    """Norm of the whole gradient before clipping, on the device, while the optimizer steps (at stage 0 if clipped)."""
    holder = zero_optimizer(engine) or engine
    norm: torch.Tensor = holder._global_grad_norm  # noqa: SLF001
    return norm


def loss_scaler(engine: Any) -> Any:
    """fp16's dynamic loss scaler, whose state is ``SCALER_STATE``; None in other precisions."""
    if not (engine.fp16_enabled() and engine.dynamic_loss_scale()):
        return None
    scaler = engine.optimizer.loss_scaler
    scaler.raise_error_at_min_scale = False  # the recipe says how many skipped steps are too many
    return scaler


def mask_nan_or_inf_with_val_inplace(norm: torch.Tensor, device: object = None, val: float = -1.0) -> None:  # noqa: ARG001
    """Equal to DeepSpeed's function of this name, without the copy of ``val`` to the device that a host waits for."""
    norm.masked_fill_(~norm.isfinite(), val)


def clip_tensors_by_global_norm(
    input_tensors: list[torch.Tensor],
    max_norm: float,
    global_norm: torch.Tensor,
    mpu: object = None,  # noqa: ARG001
    eps: float = 1e-6,
) -> None:
    """Equal to DeepSpeed's function of this name, without asking the device whether anything is to be clipped."""
    torch._foreach_mul_(input_tensors, (max_norm / (global_norm + eps)).clamp(max=1.0))


def skip_on_device(engine: Any) -> None:
    """Keep a ZeRO optimizer from asking the device in every step whether the norm is finite, and how large it is."""
    zero = zero_optimizer(engine)
    module = sys.modules[type(zero).__module__]
    for own in (mask_nan_or_inf_with_val_inplace, clip_tensors_by_global_norm):
        for user in (module, sys.modules["deepspeed.runtime.utils"]):
            if hasattr(user, own.__name__):
                setattr(user, own.__name__, own)
    original, question = zero.step, module.is_invalid_grad_norm

    def step(closure: Any = None) -> None:
        module.is_invalid_grad_norm = lambda _norm: False  # type: ignore[attr-defined]
        try:
            original(closure)
        finally:
            module.is_invalid_grad_norm = question  # type: ignore[attr-defined]

    zero.step = step
    zero.check_overflow = lambda *_, **__: None


def list_shards(
    engine: Any, names: Mapping[torch.nn.Parameter, str]
) -> Iterator[tuple[str, tuple[int, ...], int, int, torch.Tensor, int]]:
    """What this rank owns of each parameter at ZeRO stages 1 to 3, in the order of ``names``.

    For checkpoints keyed by name; DeepSpeed has no public way to its fp32 partitions for all stages.

    Yields:
        the fields of ``OptimizerShard``: name, shape, offset, length, flat partition, offset in the partition.
    """
    zero = engine.optimizer
    for parameter, name in names.items():
        full: Any = parameter
        if engine.zero_optimization_stage() == 3:
            group, flat_offset, size = zero.grad_position[zero.get_param_id(parameter)]
            offset = min(dist.get_rank() * size, full.ds_numel)
            length = min(size, full.ds_numel - offset)
            if length:
                flat = zero.fp32_partitioned_groups_flat[group]
                yield name, tuple(full.ds_shape), offset, length, flat, flat_offset
        elif full._hp_mapping is not None:  # noqa: SLF001 - else it is another rank's
            mapping = full._hp_mapping  # noqa: SLF001
            flat = flat_partitions(engine)[mapping.param_group_index]
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield name, tuple(parameter.shape), here.start, here.numel, flat, there.start


def count_parameters(model: torch.nn.Module) -> int:
    """Parameters of a network, also where ZeRO stage 3 holds only a part of each."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())


def flat_partitions(engine: Any) -> list[torch.Tensor]:
    """This rank's flat fp32 partition of each parameter group at stages 1 to 3; it may be padding only."""
    zero = engine.optimizer
    # BF16_Optimizer (bf16 with fp32 gradient accumulation) has another name for them.
    names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
    found: list[torch.Tensor] = next(getattr(zero, name) for name in names if hasattr(zero, name))
    return found


def update_weights(engine: Any) -> None:
    """Copy the fp32 partitions into the network's weights at stages 1 to 3. Collective."""
    zero = engine.optimizer
    if engine.zero_optimization_stage() < 3:
        zero.update_lp_params()
        return
    zero.checkpoint_event_prologue()
    for group in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(group)  # noqa: SLF001
    zero.checkpoint_event_epilogue()
