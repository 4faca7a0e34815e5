"""How long it takes: from a measurement of this kind of GPU, or what its peak allows at best."""

import json
import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

from pretrain.devices import Device
from pretrain.outcome import UserError

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Measurement:
    """Training images per second of one device, as a benchmark has written it."""

    images_per_s: float
    device: str
    conditions: str
    """The benchmark's own line: batch, picture size, precision."""
    file: str


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
            return f"measured: {self.measured.file}"
        return f"ASSUMED: an MFU of {self.mfu:.0%}" if self.assumed else NOT_MEASURED


def speed_of(device: Device, peak: float, flops: float, measured: Measurement | None, mfu: float | None) -> Speed:
    """Put together what is known of a GPU's speed.

    Args:
        device: the kind of GPU.
        peak: its FLOP/s in the precision that is trained in.
        flops: of one picture, ``efficiency.model_flops_per_image``.
        measured: a benchmark's number; left out where it is of another kind of device.
        mfu: share of the peak to assume where nothing was measured.
    """
    if measured is not None and re.search(device.pattern, measured.device) is None:
        measured = None
    bound = peak / flops
    return Speed(measured, bound, None if mfu is None else mfu * bound, mfu, flops)


def read_benchmark(path: Path, model: str, size: tuple[int, int], *, compiled: bool) -> Measurement:
    """Find a model's training images per second in a result of ``python -m benchmarks``.

    Raises:
        UserError: the file cannot be read, is none of these, or holds no measurement of this model at this picture size
            and mode.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--benchmark {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except ValueError as error:
        raise UserError(f"--benchmark {path}: is no result of python -m benchmarks: {error}") from None
    mode = "compiled" if compiled else "eager"
    wanted = f"{model}, {mode}, at {size[0]} x {size[1]} pixels"
    try:
        section = content["sections"]["model"]
        conditions, device = section["conditions"], section["machine"]["name"]
        rows = [row for row in section["rows"] if (row["model"], row["mode"]) == (model, mode)]
        if rows and size == (conditions["size"], conditions["size"]):
            rate = conditions["batch"] / statistics.median(rows[0]["training_s"])
            said = ", ".join(f"{name} {value}" for name, value in conditions.items())
            return Measurement(rate, device, said, str(path))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"--benchmark {path}: has no whole section of benchmarks.model ({type(error).__name__}: {error}); measure: "
            "python -m benchmarks.model"
        ) from None
    raise UserError(f"--benchmark {path}: holds no training images/s of {wanted}; measure: python -m benchmarks.model")


def hours(images_seen: float, per_gpu: float, gpus: int) -> float:
    """Wall-clock hours at a constant speed."""
    return images_seen / (per_gpu * gpus) / 3600 if per_gpu else math.inf
