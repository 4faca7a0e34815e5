"""Scales and the numbers beside them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LOG_FROM = 50.0
"""A curve whose highest value is so many times its median is drawn on a logarithmic scale, if all of it is positive."""
_FROM_ZERO = 0.4
"""An axis begins at zero where the lowest value is below this share of the highest."""
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Scale:
    """From values to pixels along one direction."""

    low: float
    high: float
    begin: float
    """Pixel of ``low``."""
    end: float
    log: bool = False

    def pixels(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Positions of values, (n,); a logarithmic scale takes positive ones only."""
        low, high = self.low, self.high
        if self.log:
            values, low, high = np.log10(values), math.log10(low), math.log10(high)
        return self.begin + (values - low) / (high - low) * (self.end - self.begin)

    def pixel(self, value: float) -> float:
        """Position of one value."""
        return float(self.pixels(np.array([value]))[0])

    def ticks(self, about: int) -> list[float]:
        """Round values along it, ``about`` so many."""
        if not self.log:
            return round_values(self.low, self.high, about)
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        every = max(1, -(-(last - first + 1) // about))
        powers = [10.0**power for power in range(first, last + 1, every)]
        return powers if len(powers) > 1 else round_values(self.low, self.high, about)


def value_scale(values: Sequence[NDArray[np.float64]], begin: float, end: float) -> Scale:
    """The scale on which curves of finite values are read best; there is at least one value."""
    low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
    median = float(np.median(np.concatenate(values)))
    if low > 0 and high / median > LOG_FROM:
        return Scale(low / 1.1, high * 1.1, begin, end, log=True)
    if 0 <= low < _FROM_ZERO * high:
        low = 0.0
    if low == high:
        margin = 0.5 * abs(low) or 1.0
        return Scale(low - margin, high + margin, begin, end)
    margin = 0.05 * (high - low)
    return Scale(low - (margin if low else 0.0), high + margin, begin, end)


def round_values(low: float, high: float, about: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within [low, high]."""
    step = _round_step((high - low) / max(about, 1))
    if not math.isfinite(step) or step <= 0:
        return []
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)][: 4 * about]


def _round_step(rough: float) -> float:
    if not math.isfinite(rough) or rough <= 0:
        return math.nan
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))


def short(value: float) -> str:
    """A count or a large number: 1,234 or 12.8 k or 1.2 M."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (limit if unit != 'k' else 1e3):.4g} {unit}"
    return f"{value:,.0f}" if value == round(value) else f"{value:.4g}"


def number(value: object) -> str:
    """A measured value in five digits, as a person writes it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if not math.isfinite(value):
        return "not finite"
    if value == round(value) and abs(value) < 1e15:
        return f"{value:,.0f}"
    if abs(value) >= 10000:
        return f"{value:,.0f}"
    if abs(value) >= 1e-3:
        return f"{value:.5g}"
    mantissa, exponent = f"{value:.4g}".split("e") if "e" in f"{value:.4g}" else f"{value:.3e}".split("e")
    return f"{float(mantissa):.4g}·10{str(int(exponent)).translate(_SUPERSCRIPT)}"


def tick_labels(values: Sequence[float], *, log: bool = False) -> tuple[list[str], str]:
    """Labels of round values along an axis, and the power of ten that is taken out of them, "" for none."""
    if log:
        return [number(value) for value in values], ""
    largest = max((abs(value) for value in values), default=0.0)
    if 0 < largest < 1e-2:
        power = math.floor(math.log10(largest) + 1e-9)
        labels = [f"{value / 10.0**power:.4g}" for value in values]
        return labels, f"10{str(power).translate(_SUPERSCRIPT)}"
    if largest >= 1e4:
        return [short(value) for value in values], ""
    return [f"{value:.4g}".replace("-", "\u2212") for value in values], ""
