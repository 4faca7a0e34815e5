"""A picture of curves, as SVG: once over samples seen, and once over wall time where it is known."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from pretrain.report.axes import Scale, number, round_values, short, tick_labels, value_scale
from pretrain.report.curves import Curve, Floats, thinned
from pretrain.report.marks import INTERRUPTIONS, Mark
from pretrain.report.markup import Markup, joined, tag
from pretrain.report.panels import Line, Panel

WIDTH, HEIGHT = 520, 214
LEFT, RIGHT, TOP, BOTTOM = 56, 10, 10, 36
_DOTS_UP_TO = 40
"""A curve of so few points has a dot for each."""
_MOST_RULES = 100
COLOURS = 8
DASHES = ("", "5 3", "1.5 2.5", "8 3 1.5 3")


@dataclass(frozen=True)
class Axis:
    """What stands along the bottom of every picture."""

    name: Literal["samples", "time"]
    end: float
    """Of all runs together, in ``unit``s."""
    unit: float = 1.0
    """Seconds, for time."""
    label: str = "images"
    epoch_size: float | None = None
    """Where all runs have the same."""
    began: tuple[float, ...] = ()
    """Unix time at which each run began, for time."""

    def scale(self, left: float, right: float) -> Scale:
        """From 0 to the end of the longest run."""
        return Scale(0.0, self.end, left, right)

    def places(self, run: int, curve: Curve) -> Floats:
        """Where the points of a curve stand, (n,); NaN where it is not known."""
        return self.at(run, curve.samples, curve.time)

    def at(self, run: int, samples: Floats, time: Floats) -> Floats:
        """Where points stand that were reached at these samples and Unix times, (n,)."""
        return samples if self.name == "samples" else (time - self.began[run]) / self.unit


@dataclass(frozen=True)
class Rule:
    """A vertical line through every picture: an interruption of a run."""

    run: int
    samples: float
    time: float
    text: str


def colour_class(line: Line, runs: int) -> str:
    """Colours tell runs apart, or, where there is one run only, its curves."""
    return f"c{(line.run if runs > 1 else line.series) % COLOURS}"


def dash(line: Line, runs: int) -> str | None:
    """Dashes tell the curves of a run apart where colours do not."""
    return DASHES[(line.series if runs > 1 else line.series // COLOURS) % len(DASHES)] or None


def draw(panel: Panel, axes: list[Axis], rules: list[Rule], runs: int) -> Markup | None:
    """The picture; None where no value is finite."""
    finite = [line.curve.values[np.isfinite(line.curve.values)] for line in panel.lines]
    finite = [values for values in finite if len(values)]
    if not finite:
        return None
    scale = value_scale(finite, HEIGHT - BOTTOM, TOP)
    grid, power = _grid(scale)
    groups = [_along(axis, panel, scale, rules, runs) for axis in axes]
    above = " · ".join(
        part for part in (f"\u00d7 {power}" if power else "", "logarithmic" if scale.log else "") if part
    )
    note = tag("text", above, x=WIDTH - RIGHT, y=TOP + 4, class_="unit", text_anchor="end") if above else None
    return tag(
        "svg", grid, *groups, note, tag("line", class_="cursor", y1=TOP, y2=HEIGHT - BOTTOM),
        viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=f"{panel.title}: {_summary(panel)}", class_="chart",
        data_low=scale.low, data_high=scale.high, data_top=TOP, data_bottom=HEIGHT - BOTTOM,
        data_log="1" if scale.log else None,
    )  # fmt: skip


def x_axis(axis: Axis, left: float, right: float, bottom: float) -> Markup:
    """Ticks and labels along the bottom, named at the left; under samples seen also the epochs."""
    scale = axis.scale(left, right)
    parts = [
        tag("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="axis"),
        tag("text", axis.label, x=left - 14, y=bottom + 14, text_anchor="end", class_="epoch"),
    ]
    for value in round_values(0, axis.end, 5):
        x = _px(scale.pixel(value))
        text = short(value) if axis.name == "samples" else f"{value:.4g}"
        parts.append(tag("line", x1=x, x2=x, y1=bottom, y2=bottom + 3, class_="tick"))
        parts.append(tag("text", text, x=x, y=bottom + 14, text_anchor="middle"))
    if axis.name == "samples" and axis.epoch_size:
        parts.append(tag("text", "epochs", x=left - 14, y=bottom + 27, text_anchor="end", class_="epoch"))
        for value in round_values(0, axis.end / axis.epoch_size, 8):
            x = _px(scale.pixel(value * axis.epoch_size))
            parts.append(tag("text", f"{value:.4g}", x=x, y=bottom + 27, text_anchor="middle", class_="epoch"))
    return joined(*parts)


def _grid(scale: Scale) -> tuple[Markup, str]:
    ticks = scale.ticks(4)
    labels, power = tick_labels(ticks, log=scale.log)
    parts = []
    for value, label in zip(ticks, labels, strict=True):
        y = _px(scale.pixel(value))
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", label, x=LEFT - 6, y=float(y) + 3.5, text_anchor="end"))
    return joined(*parts), power


def _along(axis: Axis, panel: Panel, scale: Scale, rules: list[Rule], runs: int) -> Markup:
    across = axis.scale(LEFT, WIDTH - RIGHT)
    drawn = [_rule(axis, across, rule, runs) for rule in rules]
    drawn += [_line(line, axis, across, scale, rules=rules, runs=runs) for line in panel.lines]
    return tag(
        "g", x_axis(axis, LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM), *drawn,
        class_=f"by-{axis.name}", data_end=axis.end, data_left=LEFT, data_right=WIDTH - RIGHT,
        data_unit=axis.label,
    )  # fmt: skip


def _line(line: Line, axis: Axis, across: Scale, scale: Scale, *, rules: list[Rule], runs: int) -> Markup:
    x, y = axis.places(line.run, line.curve), line.curve.values
    inside = np.isfinite(x) & (x >= 0) & (x <= axis.end * (1 + 1e-9))
    finite = inside & np.isfinite(y)
    columns = _columns(across.pixels(x[inside & ~finite]))
    broken = [tag("text", "\u00d7", x=column, y=TOP + 7, class_="broken") for column in columns]
    order = np.argsort(x[finite], kind="stable")
    x, y = x[finite][order], y[finite][order]
    kept = thinned(x, y, 0.0, axis.end)
    points = [f"{_px(a)},{_px(b, 2)}" for a, b in zip(across.pixels(x[kept]), scale.pixels(y[kept]), strict=True)]
    begins = _begins(x[kept], line.run, axis, rules)
    drawn = "".join(("M" if begin else "L") + point for begin, point in zip(begins, points, strict=True))
    path = tag("path", d=drawn, stroke_dasharray=dash(line, runs), data_label=line.label)
    dots = []
    if len(points) <= _DOTS_UP_TO:
        dots = [tag("circle", cx=point.split(",")[0], cy=point.split(",")[1], r=1.9) for point in points]
    return tag(
        "g",
        path if points else None,
        *dots,
        *broken,
        class_=f"line r{line.run} {colour_class(line, runs)}",
        data_run=line.run,
    )


def _begins(x: Floats, run: int, axis: Axis, rules: list[Rule]) -> list[bool]:
    """Whether a stretch of the curve begins at each point: over time, a curve has a gap where its run was down."""
    begins = np.zeros(len(x), bool)
    begins[:1] = True
    if axis.name == "time":
        times = np.array([rule.time for rule in rules if rule.run == run])
        places = axis.at(run, times, times)
        after = np.searchsorted(x, places[np.isfinite(places)])
        begins[after[after < len(x)]] = True
    return begins.tolist()


def _rule(axis: Axis, across: Scale, rule: Rule, runs: int) -> Markup | None:
    place = float(axis.at(rule.run, np.array([rule.samples]), np.array([rule.time]))[0])
    if not 0 <= place <= axis.end:
        return None
    x = _px(across.pixel(place))
    colour = f"c{rule.run % COLOURS}" if runs > 1 else ""
    return tag(
        "line", tag("title", rule.text), x1=x, x2=x, y1=TOP, y2=HEIGHT - BOTTOM, class_=f"rule r{rule.run} {colour}"
    )


def interruptions(run: int, marks: list[Mark]) -> list[Rule]:
    """Restarts, and where the weights went back; evenly chosen where they are more than a picture can show."""
    found = [
        Rule(
            run, np.nan if mark.samples is None else mark.samples, np.nan if mark.time is None else mark.time, mark.text
        )
        for mark in marks
        if mark.kind in INTERRUPTIONS
    ]
    return found[:: max(1, -(-len(found) // _MOST_RULES))]


def _columns(pixels: Floats) -> list[str]:
    return [_px(x) for x in np.unique(np.round(pixels)).tolist()]


def _summary(panel: Panel) -> str:
    ends = [(line.label or "curve", number(float(line.curve.values[-1]))) for line in panel.lines[:8]]
    return "; ".join(f"{label} ends at {value}" for label, value in ends)


def _px(value: float, digits: int = 1) -> str:
    return f"{value:.{digits}f}".rstrip("0").rstrip(".")
