"""Runs side by side: how they stand, where they differ, what they came to."""

import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import numpy as np

from pretrain.report.axes import number
from pretrain.report.curves import Curve, as_finite
from pretrain.report.markup import Markup, joined, table, tag
from pretrain.report.panels import KNOWN
from pretrain.report.source import RunRecord
from pretrain.report.timeline import stamp

ABSENT = "\u2013"
_MOST_FIELDS = 2000
_DEEPEST = 8
_LONGEST = 200
"""Characters of a value."""
_FACTS = (
    "state", "reason", "steps", "images seen", "top-1", "top-1 of the average", "top-1 of the hand-off",
    "time of training", "images/s, evaluations included", "restarts", "ranks", "last sign of life", "folder",
)  # fmt: skip
"""What is told of a run, in this order."""
_NO_DIFFERENCE = ("name",)
"""Differs in every run, and says nothing."""
_OF_THE_START = ("command", "host", "user", "dataset.class_names", "dataset.class_ids", "dataset.class_levels")
"""Of the environment, what is long or of one start only."""


def standing(records: list[RunRecord]) -> Markup:
    """How the runs stand; a column each."""
    facts = [dict(_facts(record)) for record in records]
    rows = [
        [name, *(column.get(name, ABSENT) for column in facts)]
        for name in _FACTS
        if any(name in column for column in facts)
    ]
    if len(records) > 1:
        return table(["", *_heads(records)], rows, class_="facts")
    half = -(-len(rows) // 2)
    return tag(
        "div", *(table([], part, class_="facts") for part in (rows[:half], rows[half:]) if part), class_="beside"
    )


def _facts(record: RunRecord) -> Iterator[tuple[str, Any]]:
    state, metrics = record.state, record.metrics
    if state is not None:
        yield "state", tag("span", state.state, class_=f"state {_known_state(state.state)}")
        if state.reason:
            yield "reason", state.reason
        total = f" of {state.total_steps:,.0f}" if state.total_steps else ""
        yield "steps", f"{state.step:,.0f}{total}"
        epochs = f" ({state.samples_seen / record.epoch_size:.2f} epochs)" if record.epoch_size else ""
        yield "images seen", f"{state.samples_seen:,.0f}{epochs}"
    for kind, name in (("eval", "top-1"), ("eval_average", "top-1 of the average")):
        curve = metrics.curves.get((kind, "top1"))
        if curve is not None:
            best = int(np.nanargmax(curve.values)) if np.isfinite(curve.values).any() else len(curve.values) - 1
            at = f", best {curve.values[best]:.2f} %" if best < len(curve.values) - 1 else ", its best"
            yield name, f"{curve.values[-1]:.2f} %{at if len(curve.values) > 1 else ''}"
    summary = {key: as_finite(value) for key, value in record.summary.items()}
    if (handoff := summary.get("handoff_top1")) is not None:
        yield "top-1 of the hand-off", f"{handoff:.2f} %"
    if (seconds := summary.get("seconds")) is not None and abs(seconds) < 1e11:
        yield "time of training", str(timedelta(seconds=round(seconds)))
    if (rate := summary.get("images_per_second")) is not None:
        yield "images/s, evaluations included", number(rate)
    if state is not None:
        yield "restarts", f"{state.restarts:,.0f}"
        yield "ranks", f"{state.world_size:,.0f}"
        yield "last sign of life", f"{stamp(state.updated)} UTC"
    yield "folder", str(record.path)


def _known_state(state: Any) -> str:
    return state if state in ("running", "preempted", "finished", "failed") else "unknown"


def results(records: list[RunRecord]) -> Markup:
    """Every measurement's last value for each run; of one run also the lowest and the highest."""
    keys = list(dict.fromkeys(key for record in records for key in record.metrics.curves))
    order = {name: place for place, name in enumerate(KNOWN)}
    keys.sort(key=lambda key: order.get(key, len(order)))
    rows = []
    for kind, key in keys[:_MOST_FIELDS]:
        curves = [record.metrics.curves.get((kind, key)) for record in records]
        rows.append([f"{kind}: {key}", *(_last(curve) for curve in curves)])
        if len(records) == 1 and curves[0] is not None:
            rows[-1] += _extremes(curves[0])
    head = ["", *_heads(records)] if len(records) > 1 else ["", "last", "lowest", "highest", "not finite"]
    return table(head, rows, class_="numbers")


def _last(curve: Curve | None) -> str:
    return ABSENT if curve is None else number(float(curve.values[-1]))


def _extremes(curve: Curve) -> list[str]:
    finite = curve.values[np.isfinite(curve.values)]
    ends = [number(float(finite.min())), number(float(finite.max()))] if len(finite) else [ABSENT, ABSENT]
    missing = len(curve.values) - len(finite)
    return [*ends, f"{missing:,} of {len(curve.values):,}" if missing else ""]


def differences(records: list[RunRecord]) -> Markup:
    """What differs in the recipes, DeepSpeed's configuration and the environments."""
    parts = []
    for what, contents in (
        ("recipe", [record.recipe for record in records]),
        ("DeepSpeed", [record.deepspeed for record in records]),
        ("environment", [record.environment for record in records]),
    ):
        leaves = [dict(_flat(content)) for content in contents]
        hidden = _NO_DIFFERENCE if what == "recipe" else _OF_THE_START if what == "environment" else ()
        names = [name for name in dict.fromkeys(n for column in leaves for n in column) if not _is_in(name, hidden)]
        rows = [
            [name, *(column.get(name, ABSENT) for column in leaves)]
            for name in names
            if len({column.get(name, "null") for column in leaves}) > 1  # what is off may also be left out
        ]
        missing = [record.name for record, content in zip(records, contents, strict=True) if not content]
        if missing:
            parts.append(tag("p", f"The {what} of {', '.join(missing)} is not there to compare.", class_="note"))
        if rows:
            parts.append(table([what, *_heads(records)], rows, class_="differences"))
        elif not missing:
            parts.append(tag("p", f"No difference: {what}.", class_="note"))
    return joined(*parts)


def fields(content: dict[str, Any]) -> Markup:
    """A mapping as a table of its leaves."""
    return table([], [[name, value] for name, value in _flat(content)], class_="fields")


def _is_in(name: str, sections: tuple[str, ...]) -> bool:
    return any(name == section or name.startswith(f"{section}.") for section in sections)


def _flat(
    content: dict[str, Any], prefix: str = "", depth: int = 1, budget: list[int] | None = None
) -> Iterator[tuple[str, str]]:
    """Leaves of nested mappings by dotted name; bounded, whatever the file holds."""
    budget = [_MOST_FIELDS] if budget is None else budget
    for key, value in content.items():
        if budget[0] <= 0:
            return
        if isinstance(value, dict) and value and depth < _DEEPEST:
            yield from _flat(value, f"{prefix}{key}.", depth + 1, budget)
        else:
            budget[0] -= 1
            yield f"{prefix}{key}"[:_LONGEST], _value(value)


def _value(value: Any) -> str:
    if isinstance(value, list) and len(value) > 20:
        return f"{_value(value[:5])[:-1]}, \u2026] ({len(value):,})"
    if isinstance(value, dict) and value:
        return f"{{\u2026}} ({len(value):,})"
    try:
        text = value if isinstance(value, str) else json.dumps(value, default=str)
    except (ValueError, RecursionError):  # a file that refers to itself
        text = "\u2026"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}\u2026"


def _heads(records: list[RunRecord]) -> list[Markup]:
    """Names of several runs, each with its colour."""
    return [joined(tag("span", class_=f"key c{number}"), record.name) for number, record in enumerate(records)]
