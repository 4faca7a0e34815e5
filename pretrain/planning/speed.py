"""How long it takes: from a measurement of this kind of GPU, or what its peak allows at best."""

import math
import re
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
    """Find a model's training images per second in a results file of ``benchmarks.model``.

    The newest matching row counts: sections are appended.

    Raises:
        UserError: the file cannot be read, or holds no measurement of this model at this picture size and mode.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--benchmark {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    mode, found = "compiled" if compiled else "eager", None
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        device, _, rest = section.partition("\n")
        lines = rest.splitlines()
        column = None
        conditions = next((line for line in lines if line.startswith("`python -m benchmarks.")), "")
        if f"{size[0]} x {size[1]}" not in conditions:
            continue
        for line in lines:
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if "training, images/s" in cells:
                column = cells.index("training, images/s")
            elif column is not None and cells[:2] == [model, mode]:
                try:
                    rate = float(cells[column])
                except (ValueError, IndexError):
                    continue
                if rate > 0:
                    found = Measurement(rate, device.strip(), conditions.partition(": ")[2], str(path))
    if found is None:
        raise UserError(
            f"--benchmark {path}: holds no training images/s of {model}, {mode}, at {size[0]} x {size[1]} pixels; "
            "measure: python -m benchmarks.model"
        )
    return found


def hours(images_seen: float, per_gpu: float, gpus: int) -> float:
    """Wall-clock hours at a constant speed."""
    return images_seen / (per_gpu * gpus) / 3600 if per_gpu else math.inf
