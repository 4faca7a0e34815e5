"""Which keys of DeepSpeed's configuration are allowed, and why others are not.

DeepSpeed ignores unknown top-level keys and raises far from the cause on others, so every key is checked here first.
"""

import difflib
from typing import Any

from pydantic import ValidationError

from pretrain.fields import did_you_mean, explain, shown
from pretrain.outcome import UserError

ALLOWED = frozenset(
    {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "zero_optimization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "bf16",
        "fp16",
        "torch_autocast",
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
    "activation_checkpointing": "it configures DeepSpeed's own checkpointing, which is not used here: set "
    "model.activation_checkpointing in the recipe",
    "compile": "set model.compile in the recipe",
    "amp": "apex.amp was removed from DeepSpeed and apex: use bf16, fp16 or torch_autocast",
    "bfloat16": "it is DeepSpeed's old name: write bf16",
    "checkpoint": "checkpoints are written by this project: set checkpoint.* in the recipe",
    "tensorboard": "TensorBoard is always written to the run's folder",
    "wandb": "TensorBoard and metrics.jsonl are always written to the run's folder",
    "csv_monitor": "metrics.jsonl is always written to the run's folder",
    "nebula": "it was removed from DeepSpeed",
    "elasticity": "it was removed from DeepSpeed; any run here resumes with another number of GPUs",
    "curriculum_learning": "it was removed from DeepSpeed",
}

_SKIPS = "it must stay true, or steps with non-finite gradients are not skipped"
_FP32_STATE = "it must stay false: checkpoints hold fp32 weights and moments"
_UNREAD = "untested with checkpoints, which may not read its state: leave it out"
_OLD_OFFLOAD = 'it is DeepSpeed\'s old name: write "offload_optimizer": {"device": "cpu"}'

# Fields of sections: the values that are allowed, and why no others.
REFUSED_WITHIN: dict[tuple[str, str], tuple[tuple[Any, ...], str]] = {
    ("bf16", "check_grad_overflow"): ((True,), _SKIPS),
    ("bf16", "bf16_master_weights_and_grads"): ((False,), _FP32_STATE),
    ("bf16", "bf16_optimizer_states"): ((False,), _FP32_STATE),
    ("fp16", "fp16_master_weights_and_grads"): ((False,), _FP32_STATE),
    ("zero_optimization", "compute_grad_norm"): ((True,), _SKIPS),
    ("zero_optimization", "cpu_offload"): ((None, False), _OLD_OFFLOAD),
    ("zero_optimization", "cpu_offload_param"): ((None, False), _OLD_OFFLOAD.replace("optimizer", "param")),
    ("zero_optimization", "zenflow"): ((None,), _UNREAD),
    ("zero_optimization", "zero_hpz_partition_size"): ((1,), _UNREAD),
    ("zero_optimization", "zero_quantized_weights"): ((False,), _UNREAD),
    ("zero_optimization", "zero_quantized_nontrainable_weights"): ((False,), _UNREAD),
    ("zero_optimization", "zero_quantized_gradients"): ((False,), _UNREAD),
    ("offload_optimizer", "ratio"): ((1, 1.0), "what stays on the GPU would be missing in checkpoints: leave it out"),
    ("offload_optimizer", "super_offload"): ((False,), _UNREAD),
    ("data_types", "param_dtype"): ((None,), "the sections bf16 and fp16 set it: leave it out"),
    ("data_types", "buffer_dtype"): ((None,), "the model has no buffers that it would change: leave it out"),
    ("data_types", "keep_in_fp32_modules"): ((None,), _UNREAD),
}

FLOATS = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16", "float": "float32"}
"""DeepSpeed's other names of the types."""


def check_keys(config: dict[str, Any], where: str, *, complete: bool = True) -> None:
    """Check every key of a configuration, and the values of those that cannot be left to DeepSpeed.

    The recipe's section, which leaves out what the file has, is not ``complete``. ``where`` names it in errors.

    Raises:
        UserError: a key or value that DeepSpeed or this project would not honor.
    """
    if complete and config.get("gradient_clipping") is None:
        raise UserError(f"{where}: write gradient_clipping (0.0 is off): DeepSpeed would silently clip at 1.0")
    zero = config.get("zero_optimization")
    if not complete and isinstance(zero, dict):
        config = config | {"zero_optimization": {"stage": 3} | zero}  # at which DeepSpeed lets every other key pass
    for key in config:
        if key in REFUSED:
            raise UserError(f"{where}: {key}: {REFUSED[key]}")
        if key not in ALLOWED:
            raise UserError(f"{where}: unknown DeepSpeed key {key}{_near(key, ALLOWED)}")
    clipping = config.get("gradient_clipping", 0.0)
    if isinstance(clipping, bool) or not isinstance(clipping, int | float) or not clipping >= 0:
        raise UserError(f"{where}: gradient_clipping is the largest norm, at least 0.0 (off), got {shown(clipping)}")
    for name in ("zero_optimization", "bf16", "fp16", "torch_autocast", "data_types"):
        if name in config:
            _check_section(name, config[name], where)
    for name in ("offload_optimizer", "offload_param"):
        section = config.get("zero_optimization", {}).get(name)
        if section is not None:
            _check_values(name, section, f"{where}: zero_optimization.{name}")
            if section.get("device", "none") not in ("none", "cpu"):
                raise UserError(
                    f"{where}: zero_optimization.{name}.device: only cpu and none, got {section['device']!r}: "
                    "checkpoints cannot see what is on NVMe; use more ranks or a higher stage instead"
                )


def _check_section(name: str, section: Any, where: str) -> None:
    if not isinstance(section, dict):
        raise UserError(f"{where}: {name} is a section, such as {{}}, got {section!r}")
    _check_values(name, section, f"{where}: {name}")
    fields = {
        "torch_autocast": {"enabled", "dtype", "lower_precision_safe_modules"},
        "data_types": {"grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"},
    }
    if name in fields:
        for key in section.keys() - fields[name]:
            raise UserError(f"{where}: unknown DeepSpeed key {name}.{key}{_near(key, fields[name])}")
        if not isinstance(section.get("enabled", False), bool):
            raise UserError(f"{where}: {name}.enabled is true or false, got {section['enabled']!r}")
        return
    section = dict(section)
    if name == "bf16" and section.get("enabled") == "auto":
        section["enabled"] = False
    if name == "zero_optimization":
        stage = section.get("stage", 0)
        if type(stage) is not int or stage not in range(4):
            raise UserError(f"{where}: zero_optimization.stage is 0, 1, 2 or 3, got {stage!r}")
    # Imported here: DeepSpeed takes seconds to import, and --help should not.
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config  # noqa: PLC0415
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # noqa: PLC0415

    schemas = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config}
    try:
        schemas[name](**section)
    except ValidationError as error:
        _, text = explain(schemas[name], section, error)[0]
        raise UserError(f"{where}: {name}: {text}") from None


def _check_values(name: str, section: dict[str, Any], where: str) -> None:
    for key, value in section.items():
        allowed, why = REFUSED_WITHIN.get((name, key), ((value,), ""))
        if value not in allowed:
            raise UserError(f"{where}.{key}: {why}")


def _near(key: str, known: set[str] | frozenset[str]) -> str:
    return did_you_mean(*difflib.get_close_matches(key, known, n=1))
