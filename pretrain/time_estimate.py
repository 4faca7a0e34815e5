"""Time of a step: the measured speed of one GPU, and communication."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

from models import model_config
from pretrain.devices import Device
from pretrain.engine.deepspeed_config import ResolvedDeepSpeed
from pretrain.factory import NetworkConfig
from pretrain.memory_estimate import Engine
from pretrain.outcome import UserError
from pretrain.recipe import Recipe

SAME_NETWORK = {"num_classes", "drop_path", "norm"}
"""Fields of a network that change its speed little, so that a measurement with others is still of use."""


def read_benchmark(
    path: Path, device: Device, config: NetworkConfig, recipe: Recipe, resolved: ResolvedDeepSpeed
) -> dict[str, Any]:
    """Find training images per second in a result of ``benchmarks.model``.

    A benchmark's "bf16" are weights stored in bf16, as by DeepSpeed's ``bf16``; ``torch_autocast`` was never measured.

    Returns:
        "images_per_s"; "device", "conditions" and "file" that it was measured with.

    Raises:
        UserError: the file cannot be read or is no such result, or was measured on another device, in another
            precision, or not of this network at this image size and mode.
    """
    wanted = (config.name, "compiled" if recipe.model.compile else "eager")
    try:
        section = json.loads(path.read_text())["sections"]["model"]
        conditions, machine = section["conditions"], section["machine"]["name"]
        batch, size, precision = conditions["batch"], conditions["size"], conditions["precision"]
        seconds = [row["training_s"] for row in section["rows"] if (row["model"], row["mode"]) == wanted]
        rates = [batch / statistics.median(times) for times in seconds]
    except (OSError, KeyError, TypeError, ValueError, ZeroDivisionError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"--benchmark {path}: has no complete section of benchmarks.model ({why})") from None
    other: set[str] = set()
    if rates:
        here, there = config.to_dict(), model_config(config.name, image_size=config.image_size).to_dict()
        other = {name for name in here if here[name] != there[name]} - SAME_NETWORK
    height, width = config.image_size
    for differs, measured in (
        (re.search(device.pattern, machine) is None, f"was measured on {machine}, and the plan is for {device.name}"),
        (not rates or {height, width} != {size}, f"lacks training of {' '.join(wanted)}, at {height} x {width} pixels"),
        (precision != resolved.precision, f"was measured in {precision}, and the plan trains in {resolved.precision}"),
        (other, f"was measured of {config.name} with another {', '.join(sorted(other))}"),
    ):
        if differs:
            raise UserError(f"--benchmark {path}: {measured}: run python -m benchmarks.model, or assume --mfu")
    described = ", ".join(f"{condition} {value}" for condition, value in conditions.items())
    return {"images_per_s": rates[0], "device": machine, "conditions": described, "file": str(path)}


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
