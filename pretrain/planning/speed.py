"""How long it takes: from a measurement of this kind of GPU, or what its peak allows at best."""

import dataclasses
import json
import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

from models import LaViTConfig, model_config
from pretrain.devices import Device
from pretrain.engine.precision import Precision
from pretrain.outcome import UserError

NOT_MEASURED = "not measured"
WITH_KERNEL = "_triton"
"""Ends the name of a network of ours that was measured with attention's Triton kernels."""
SAME_NETWORK = ("num_classes", "drop_path", "norm")
"""Fields of a network that change its speed by little, so that a measurement without them is still of use."""


@dataclass(frozen=True)
class Training:
    """What decides how fast a GPU trains."""

    network: LaViTConfig
    compiled: bool
    precision: Precision
    micro_batch: int
    recomputed: tuple[int, ...]
    """Stages, counted from 1, whose activations are recomputed."""


@dataclass(frozen=True)
class Measurement:
    """Training images per second of one device, as a benchmark has written it."""

    images_per_s: float
    device: str
    conditions: str
    """The benchmark's own line: batch, picture size, precision."""
    file: str
    differs: tuple[str, ...]
    """What the plan has otherwise than the benchmark had, each with both."""


@dataclass(frozen=True)
class Speed:
    """Of one GPU, in images per second."""

    measured: Measurement | None
    bound: float
    """What the peak allows: no run reaches it."""
    assumed: float | None
    """At the MFU that was assumed."""
    mfu: float | None
    flops_per_image: float

    @property
    def believed(self) -> float | None:
        """Measured, else assumed; None when neither is there."""
        return self.measured.images_per_s if self.measured else self.assumed

    @property
    def rests_on(self) -> str:
        """Where ``believed`` comes from."""
        if self.measured:
            how = "measured, but not as planned" if self.measured.differs else "measured"
            return f"{how}: {self.measured.file}"
        return f"ASSUMED: an MFU of {self.mfu:.0%}" if self.assumed else NOT_MEASURED


def speed_of(peak: float, flops: float, measured: Measurement | None, mfu: float | None) -> Speed:
    """Put together what is known of a GPU's speed.

    Args:
        peak: FLOP/s of the GPU in the precision that is trained in.
        flops: of one picture, ``efficiency.model_flops_per_image``.
        measured: a benchmark's number on this kind of GPU.
        mfu: share of the peak to assume where nothing was measured.
    """
    bound = peak / flops
    return Speed(measured, bound, None if mfu is None else mfu * bound, mfu, flops)


def read_benchmark(path: Path, device: Device, wanted: Training) -> Measurement | None:
    """Find training images per second in a result of ``python -m benchmarks``; None where it is of another device.

    A benchmark's "bf16" are weights stored in bf16, as by DeepSpeed's ``bf16``; ``torch_autocast`` was never measured.

    Raises:
        UserError: the file cannot be read, is none of these, or holds no measurement of this model at this picture
            size, mode and attention kernel; or it was measured in another precision, or of another network than an
            override makes of it.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--benchmark {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except ValueError as error:
        raise UserError(f"--benchmark {path}: is no result of python -m benchmarks: {error}") from None
    network, mode = wanted.network, "compiled" if wanted.compiled else "eager"
    triton = network.attention_kernel == "triton"
    name = network.name + WITH_KERNEL * triton
    try:
        section = content["sections"]["model"]
        conditions, machine = section["conditions"], section["machine"]["name"]
        if re.search(device.pattern, machine) is None:
            return None
        batch, size, precision = conditions["batch"], conditions["size"], conditions["precision"]
        rows = [row for row in section["rows"] if (row["model"], row["mode"]) == (name, mode)]
        rate = batch / statistics.median(rows[0]["training_s"]) if rows else 0.0
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"--benchmark {path}: has no whole section of benchmarks.model ({type(error).__name__}: {error}); measure: "
            "python -m benchmarks.model"
        ) from None
    if not rate or network.image_size != (size, size):
        what = f"{network.name}{' with attention_kernel triton' * triton}, {mode}"
        at = f"{network.image_size[0]} x {network.image_size[1]} pixels"
        raise UserError(
            f"--benchmark {path}: holds no training images/s of {what}, at {at}; measure: python -m benchmarks.model"
        )
    if precision != wanted.precision:
        raise UserError(
            f"--benchmark {path}: was measured in {precision}, and the plan trains in {wanted.precision}: plan in that "
            "precision, or leave --benchmark out (--mfu assumes a speed)"
        )
    said = ", ".join(f"{condition} {value}" for condition, value in conditions.items())
    return Measurement(rate, machine, said, str(path), _differences(path, wanted, batch))


def _differences(path: Path, wanted: Training, batch: int) -> tuple[str, ...]:
    network = wanted.network
    usual = model_config(
        network.name, image_size=network.image_size, attention_kernel=network.attention_kernel
    )  # as benchmarks.model builds it
    fields = [field.name for field in dataclasses.fields(LaViTConfig)]
    changed = [field for field in fields if getattr(network, field) != getattr(usual, field)]
    if foreign := [field for field in changed if field not in SAME_NETWORK]:
        raise UserError(
            f"--benchmark {path}: was measured of {network.name} as it comes, and the plan's overrides change its "
            f"{', '.join(foreign)}, which is another network: leave --benchmark out (--mfu assumes a speed)"
        )
    differs = [f"{field} {getattr(network, field)} (measured: {getattr(usual, field)})" for field in changed]
    if wanted.recomputed:
        stages = ", ".join(map(str, wanted.recomputed))
        differs.append(f"activation_checkpointing in stages {stages} (measured: none; up to a third more time)")
    if wanted.micro_batch != batch:
        differs.append(f"micro-batch {wanted.micro_batch} (measured: {batch})")
    return tuple(differs)


def hours(images_seen: float, per_gpu: float, gpus: int) -> float:
    """Wall-clock hours at a constant speed."""
    return images_seen / (per_gpu * gpus) / 3600 if per_gpu else math.inf
