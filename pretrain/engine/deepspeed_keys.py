"""Which settings of DeepSpeed are allowed, and why others are not.

DeepSpeed ignores unknown top-level keys and raises far from the cause on others, so every key is checked here first.
"""

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, StrictBool, ValidationError

from pretrain.fields import did_you_mean, explain, shown
from pretrain.outcome import UserError

_KEYS = """
train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping zero_optimization
zero_allow_untested_optimizer zero_force_ds_cpu_optimizer bf16 fp16 torch_autocast communication_data_type data_types
prescale_gradients gradient_predivide_factor disable_allgather steps_per_print wall_clock_breakdown dump_state
comms_logger flops_profiler memory_breakdown
"""
ALLOWED = frozenset(_KEYS.split())
ELSEWHERE = {
    "optimizer": "the optimizer is the recipe's: set optimizer.* there",
    "scheduler": "the schedule is the recipe's: set schedule.* there",
    "activation_checkpointing": "DeepSpeed's own is not used here: set model.activation_checkpointing in the recipe",
    "compile": "set model.compile in the recipe",
    "checkpoint": "checkpoints are written by this project: set checkpoint.* in the recipe",
    "amp": "apex.amp was removed from DeepSpeed and apex: use bf16, fp16 or torch_autocast",
    "tensorboard": "TensorBoard is always written to the run's folder",
    "wandb": "set watch.sinks in the recipe",
    "csv_monitor": "metrics.jsonl is always written to the run's folder",
    "bfloat16": "it is DeepSpeed's old name: write bf16",
}
"""Keys that users of DeepSpeed may expect, and what to set instead."""
KEEP_DEFAULT = {
    "steps with non-finite gradients would not be skipped": "check_grad_overflow compute_grad_norm",
    "checkpoints hold fp32 weights and moments": "bf16_master_weights_and_grads bf16_optimizer_states "
    "fp16_master_weights_and_grads",
    "it is an old name: write offload_optimizer or offload_param with device cpu": "cpu_offload cpu_offload_param",
    "what stays on the GPU would be missing in checkpoints": "ratio",
    "it is untested with checkpoints, which may not read its state": "super_offload zenflow zero_hpz_partition_size "
    "zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients",
}
"""Fields of sections that must keep DeepSpeed's defaults, by the reason."""
FLOATS = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16", "float": "float32"}
"""DeepSpeed's other names of the types."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _TorchAutocast(_Section):
    enabled: StrictBool = False
    dtype: str = "bfloat16"
    lower_precision_safe_modules: list[str] | None = None


class _DataTypes(_Section):
    """Without the types of parameters and buffers, which the sections bf16 and fp16 set."""

    grad_accum_dtype: str | None = None


def check_keys(config: dict[str, Any], where: str, *, complete: bool = True) -> None:
    """Check every key of a configuration, and the values of those that cannot be left to DeepSpeed.

    The recipe's section, which leaves out what the file has, is not ``complete``. ``where`` names it in errors.

    Raises:
        UserError: a key or value that DeepSpeed or this project would not honor.
    """
    if complete and config.get("gradient_clipping") is None:
        raise UserError(f"{where}: write gradient_clipping (0.0 is off): DeepSpeed would silently clip at 1.0")
    for key in config:
        if key in ELSEWHERE:
            raise UserError(f"{where}: {key}: {ELSEWHERE[key]}")
        if key not in ALLOWED:
            near = difflib.get_close_matches(key, ALLOWED, n=1)
            raise UserError(f"{where}: unknown DeepSpeed key {key}{did_you_mean(*near)}")
    clipping = config.get("gradient_clipping", 0.0)
    if isinstance(clipping, bool) or not isinstance(clipping, int | float) or not clipping >= 0:
        raise UserError(f"{where}: gradient_clipping is the largest norm, at least 0.0 (off), got {shown(clipping)}")
    # Imported here: DeepSpeed takes seconds to import, and --help should not.
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config  # noqa: PLC0415
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # noqa: PLC0415

    schemas: dict[str, type[BaseModel]] = {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "torch_autocast": _TorchAutocast,
        "data_types": _DataTypes,
    }
    for name in schemas.keys() & config.keys():
        if not isinstance(config[name], dict):
            raise UserError(f"{where}: {name} is a section, such as {{}}, got {config[name]!r}")
        section = dict(config[name])
        if name == "bf16" and section.get("enabled") == "auto":
            section["enabled"] = False
        if name == "zero_optimization":
            stage = section.setdefault("stage", 0 if complete else 3)  # 3: at which every other key is accepted
            if type(stage) is not int or stage not in range(4):
                raise UserError(f"{where}: zero_optimization.stage is 0, 1, 2 or 3, got {stage!r}")
        try:
            parsed = schemas[name](**section)
        except ValidationError as error:
            _, text = explain(schemas[name], section, error)[0]
            raise UserError(f"{where}: {name}: {text}") from None
        _check_defaults(section, parsed, f"{where}: {name}")


def _check_defaults(given: dict[str, Any], section: BaseModel, where: str) -> None:
    """Check the fields of ``KEEP_DEFAULT``, and that nothing is offloaded elsewhere than to the CPU."""
    for why, names in KEEP_DEFAULT.items():
        for name in given.keys() & {*names.split()}:
            default = type(section).model_fields[name].default
            if given[name] not in (default, None) and not (default is None and given[name] is False):
                raise UserError(f"{where}.{name}: leave it out: {why}")
    for name in ("offload_optimizer", "offload_param"):
        if given.get(name) is not None:
            offload = getattr(section, name)
            _check_defaults(given[name], offload, f"{where}.{name}")
            if offload.device not in ("none", "cpu"):
                raise UserError(
                    f"{where}.{name}.device: only cpu and none, got {offload.device!r}: checkpoints cannot see "
                    "what is on NVMe; use more ranks or a higher stage instead"
                )
