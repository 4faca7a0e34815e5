"""``metrics.jsonl`` as arrays, and as few points as a picture can show."""

import math
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.files import json_lines

COLUMNS = 450
"""A curve of more than twice so many points is cut down to the lowest and highest one of each of so many columns."""
_PLACES = ("kind", "samples_seen", "time", "step", "epoch")
"""What says where a line stands, and is no measurement."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """One measurement over a run; every array is (n,), ordered by samples seen."""

    samples: Floats
    time: Floats
    """Unix time; NaN where the line has none."""
    values: Floats


@dataclass
class Metrics:
    """All of a run's measurements."""

    curves: dict[tuple[str, str], Curve] = field(default_factory=dict)
    """By kind of line and key, in order of appearance."""
    samples: Floats = field(default_factory=lambda: np.zeros(0))
    """Of all lines of training that have a time, ascending; ``times`` says when, also ascending."""
    times: Floats = field(default_factory=lambda: np.zeros(0))
    began: float | None = None
    """Unix time of the first line."""
    epoch_size: float | None = None
    """Pictures of an epoch, as the lines have it."""
    lines: int = 0
    unreadable: int = 0


class _Kind:
    """Lines of one kind while they are read."""

    def __init__(self) -> None:
        self.samples, self.times = array("d"), array("d")
        self.keys: dict[str, tuple[array[int], array[float]]] = {}

    def add(self, samples: float, row: dict[str, Any]) -> None:
        time = as_finite(row.get("time"))
        self.samples.append(samples)
        self.times.append(math.nan if time is None else time)
        for key, content in row.items():
            value = None if key in _PLACES else as_number(content)
            if value is not None:
                rows, values = self.keys.setdefault(key, (array("q"), array("d")))
                rows.append(len(self.samples) - 1)
                values.append(value)


def read_curves(path: Path) -> Metrics:
    """All curves of ``metrics.jsonl``, whatever kinds and keys it has.

    Lines that are no measurement are counted and left out; no file is no curves.

    Raises:
        OSError: it is there and cannot be read.
    """
    found = Metrics()
    kinds: dict[str, _Kind] = {}
    if not path.exists():
        return found
    for row in json_lines(path):
        found.lines += 1
        seen = as_finite(row.get("samples_seen")) if row else None
        if row is None or seen is None or not isinstance(row.get("kind"), str):
            found.unreadable += 1
            continue
        kinds.setdefault(row["kind"], _Kind()).add(seen, row)
        epoch = as_finite(row.get("epoch"))
        if epoch and seen and row["kind"] == "train":
            found.epoch_size = seen / epoch
    for name, kind in kinds.items():
        samples, times = np.array(kind.samples), np.array(kind.times)
        began = float(np.nanmin(times)) if np.isfinite(times).any() else None
        found.began = min((first for first in (found.began, began) if first is not None), default=None)
        for key, (rows, values) in kind.keys.items():
            order = np.argsort(samples[np.array(rows)], kind="stable")
            index = np.array(rows)[order]
            found.curves[name, key] = Curve(samples[index], times[index], np.array(values)[order])
        if name == "train":
            known = np.isfinite(times)
            order = np.argsort(samples[known], kind="stable")
            found.samples = samples[known][order]
            found.times = np.maximum.accumulate(times[known][order])  # clocks of two hosts may differ
    return found


def as_number(content: Any) -> float | None:
    """A number of JSON as float; None for anything else."""
    if isinstance(content, bool) or not isinstance(content, (int, float)):
        return None
    try:
        return float(content)
    except OverflowError:
        return None


def as_finite(content: Any) -> float | None:
    """A finite number of JSON; None for anything else."""
    value = as_number(content)
    return value if value is not None and math.isfinite(value) else None


def thinned(x: Floats, y: Floats, low: float, high: float) -> NDArray[np.intp]:
    """Indices of the points that draw a curve: the lowest and the highest of every column, so that no spike is lost.

    Args:
        x: (n,), ascending and within [low, high].
        y: (n,), finite.
        low: left end of the picture.
        high: right end.
    """
    if len(x) <= 2 * COLUMNS:
        return np.arange(len(x))
    column = np.minimum(((x - low) / (high - low) * COLUMNS).astype(np.intp), COLUMNS - 1)
    order = np.lexsort((y, column))
    first = np.flatnonzero(np.diff(column[order], prepend=-1))
    last = np.append(first[1:], len(order)) - 1
    return np.unique(np.concatenate([order[first], order[last], [0, len(x) - 1]]))
