"""What happened to a run: its time line as SVG, and the same as a table."""

from collections.abc import Callable
from datetime import UTC, datetime

import numpy as np

from pretrain.report.axes import short
from pretrain.report.chart import Axis, x_axis
from pretrain.report.curves import Floats
from pretrain.report.marks import KINDS, Mark
from pretrain.report.markup import Markup, joined, table, tag

WIDTH, LEFT, RIGHT, ROW, TOP = 1080, 176, 14, 22, 6
_TOLD = 3
"""Texts of marks that share a pixel which are shown when the mouse rests there."""
_ROWS = 20
"""Rows of the table for each kind of mark; of more, the first and the last ones are shown."""


def draw_timeline(run: int, marks: list[Mark], axes: list[Axis]) -> Markup | None:
    """A row for each kind of mark that there is; None where there is none."""
    rows = [kind for kind in KINDS if any(mark.kind == kind for mark in marks)]
    if not rows:
        return None
    bottom = TOP + ROW * len(rows)
    parts = []
    for place, kind in enumerate(rows):
        y = TOP + ROW * (place + 0.5)
        mine = [mark for mark in marks if mark.kind == kind]
        parts.append(tag("text", f"{kind} ({len(mine):,})", x=LEFT - 12, y=y + 4, text_anchor="end", class_="row"))
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        parts += [tag("g", *_row(run, mine, axis, y), class_=f"by-{axis.name} k{KINDS.index(kind)}") for axis in axes]
    parts += [tag("g", x_axis(axis, LEFT, WIDTH - RIGHT, bottom), class_=f"by-{axis.name}") for axis in axes]
    counts = ", ".join(f"{sum(mark.kind == kind for mark in marks)} {kind}" for kind in rows)
    return tag(
        "svg", *parts, viewBox=f"0 0 {WIDTH} {bottom + 36}", role="img", aria_label=f"time line: {counts}",
        class_="timeline",
    )  # fmt: skip


def _row(run: int, marks: list[Mark], axis: Axis, y: float) -> list[Markup]:
    """The marks of one kind; those that share a pixel are one, taller, mark that tells how many they are."""
    places = axis.at(run, _column(marks, lambda mark: mark.samples), _column(marks, lambda mark: mark.time))
    known = np.flatnonzero(np.isfinite(places) & (places >= 0))
    pixels = np.round(axis.scale(LEFT, WIDTH - RIGHT).pixels(np.minimum(places[known], axis.end)))
    drawn = []
    for pixel in np.unique(pixels).tolist():
        here = [marks[index] for index in known[pixels == pixel][:_TOLD].tolist()]
        count = int((pixels == pixel).sum())
        text = "\n".join(
            [_where(mark) + mark.text[:300] for mark in here] + [f"and {count - _TOLD:,} more"] * (count > _TOLD)
        )
        half = 5 if count == 1 else 8
        drawn.append(tag("rect", tag("title", text), x=pixel - 1.5, y=y - half, width=3, height=2 * half, rx=1))
    return drawn


def _column(marks: list[Mark], of: Callable[[Mark], float | None]) -> Floats:
    return np.array([np.nan if (value := of(mark)) is None else value for mark in marks], np.float64)


def _where(mark: Mark) -> str:
    return f"{short(mark.samples)} images: " if mark.samples is not None else ""


def list_marks(marks: list[Mark]) -> Markup:
    """The marks as a table; of a kind that has very many the first and the last."""
    places: list[int] = []
    for kind in KINDS:
        mine = [place for place, mark in enumerate(marks) if mark.kind == kind]
        places += mine if len(mine) <= _ROWS else mine[: _ROWS // 2] + mine[-_ROWS // 2 :]
    rows = [
        [stamp(mark.time), _count(mark.step), _count(mark.samples), mark.kind, mark.text[:1000]]
        for mark in (marks[place] for place in sorted(places))
    ]
    note = None
    if len(places) < len(marks):
        note = tag("p", f"Of each kind the first and the last {_ROWS // 2}, of {len(marks):,} in all.", class_="note")
    return joined(table(["time (UTC)", "step", "images seen", "what", ""], rows, class_="events"), note)


def stamp(time: float | None) -> str:
    """A Unix time for a person, in UTC: the page may be read anywhere."""
    try:
        return "" if time is None else f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M:%S}"
    except (ValueError, OverflowError, OSError):
        return "not a date"


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"
