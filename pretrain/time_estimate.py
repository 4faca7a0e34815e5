"""Time of a step: the measured speed of one GPU, and communication."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

from models import LaViTConfig, model_config
from pretrain.devices import Device
from pretrain.engine.deepspeed_config import ResolvedDeepSpeed
from pretrain.factory import FactoryConfig
from pretrain.memory_estimate import Engine, as_booleans
from pretrain.outcome import UserError
from pretrain.recipe import Recipe

SAME_NETWORK = ("num_classes", "drop_path", "norm")
"""Fields of a network that change its speed little, so that a measurement without them is still of use."""


def read_benchmark(
    path: Path, device: Device, config: LaViTConfig | FactoryConfig, recipe: Recipe, resolved: ResolvedDeepSpeed
) -> dict[str, Any] | None:
    """Find training images per second in a result of ``benchmarks.model``; None where it is of another device.

    A benchmark's "bf16" are weights stored in bf16, as by DeepSpeed's ``bf16``; ``torch_autocast`` was never measured.

    Returns:
        "images_per_s"; "device", "conditions" and "file" that it was measured with; and as "differs" a list of what the
        plan has otherwise, each with both values.

    Raises:
        UserError: the file cannot be read, is no such result, or holds no measurement of this model at this image
            size and mode; or it was measured in another precision, or of another network than ``model.overrides`` make
            of it.
    """
    wanted = (config.name, "compiled" if recipe.model.compile else "eager")
    try:
        section = json.loads(path.read_text())["sections"]["model"]
        conditions, machine = section["conditions"], section["machine"]["name"]
        batch, size, precision = conditions["batch"], conditions["size"], conditions["precision"]
        seconds = [row["training_s"] for row in section["rows"] if (row["model"], row["mode"]) == wanted]
        rates = [batch / statistics.median(times) for times in seconds]
    except OSError as error:
        raise UserError(f"--benchmark {path}: cannot be read: {error.strerror}") from None
    except (KeyError, TypeError, ValueError, ZeroDivisionError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"--benchmark {path}: has no complete section of benchmarks.model ({why})") from None
    if re.search(device.pattern, machine) is None:
        return None
    if not rates or config.image_size != (size, size):
        at = f"{config.image_size[0]} x {config.image_size[1]} pixels"
        what = f"{' '.join(wanted)}, at {at}; measure: python -m benchmarks.model"
        raise UserError(f"--benchmark {path}: holds no training images/s of {what}")
    if precision != resolved.precision:
        why = f"was measured in {precision}, and the plan trains in {resolved.precision}: assume a speed with --mfu"
        raise UserError(f"--benchmark {path}: {why}")
    here, there = config.to_dict(), model_config(config.name, image_size=config.image_size).to_dict()
    changed = {name: (here[name], there[name]) for name in here if here[name] != there[name]}
    if foreign := changed.keys() - {*SAME_NETWORK}:
        why = f"was measured of {config.name} with another {', '.join(sorted(foreign))}: assume a speed with --mfu"
        raise UserError(f"--benchmark {path}: {why}")
    differs = [f"{name} {planned} (measured: {measured})" for name, (planned, measured) in changed.items()]
    if any(stages := as_booleans(recipe.model.activation_checkpointing)):
        listed = ", ".join(str(stage) for stage, again in enumerate(stages, 1) if again)
        differs.append(f"activation_checkpointing in stages {listed} (measured: none; up to a third more time)")
    if resolved.batch.micro_batch != batch:
        differs.append(f"micro-batch {resolved.batch.micro_batch} (measured: {batch})")
    described = ", ".join(f"{condition} {value}" for condition, value in conditions.items())
    return {
        "images_per_s": rates[0], "device": machine, "conditions": described, "file": str(path), "differs": differs,
    }  # fmt: skip


def communicated_bytes(engine: Engine, parameters: int) -> float:
    """Bytes that each rank sends in one optimizer step over rings: ``(n - 1) / n`` of what is reduced or gathered.

    A reduce-scatter or an all-gather sends that once, an all-reduce twice. DeepSpeed 0.19 all-reduces gradients at
    stages 0 and 1 once, at stage 2 in every micro-batch, and gathers weights after the step of stages 1 and 2. At
    stage 3 every micro-batch gathers weights and reduce-scatters gradients.
    """
    times, element = engine.accumulation, 2 if engine.low_traffic else engine.element
    reduced = {0: 2, 1: 2, 2: 2 * times, 3: times}[engine.stage] * element
    gathered = {0: 0, 1: engine.element, 2: engine.element, 3: times * element}[engine.stage]
    return (engine.ranks - 1) / engine.ranks * parameters * (reduced + gathered)
