"""Which curves stand in one picture, and what the picture is called.

Nothing here needs to know a metric: what is not named below has a picture under its own name.
"""

import re
from dataclasses import dataclass

import numpy as np

from pretrain.report.curves import Curve, Metrics

KNOWN = {
    ("train", "loss"): "training loss",
    ("eval", "top1"): "top-1 accuracy, %",
    ("train", "cross_entropy"): "training cross-entropy, nats",
    ("train", "semantic_softmax"): "training semantic softmax, nats",
    ("train", "diagonality"): "diagonality loss, unweighted",
    ("eval", "loss"): "evaluation cross-entropy, nats",
    ("eval", "top5"): "top-5 accuracy, %",
    ("train", "lr"): "learning rate",
    ("train", "grad_norm"): "norm of the gradient",
    ("train", "images_per_second"): "images per second",
    ("train", "data_wait"): "share of time spent waiting for data",
    ("eval", "seconds"): "seconds of an evaluation",
}
"""Titles of pictures, in their order; all others follow in the order in which they appear."""
MOST_PANELS = 120
MOST_LINES = 32
"""Curves in one picture."""
_FEW = 4
"""So many curves of each run can be told apart where colours tell runs apart."""
_MEMBER = re.compile(r"^(?P<stem>.+?)[_./]?(?P<member>(stage|block|layer|level|rank|group)s?[_./]?\d+)$")


@dataclass(frozen=True)
class Line:
    """A curve in a picture."""

    run: int
    series: int
    """Number among the curves that each run may have in this picture."""
    label: str
    """Of the series; "" where each run has only one."""
    curve: Curve


@dataclass(frozen=True)
class Panel:
    """A picture."""

    title: str
    lines: list[Line]
    left_out: int = 0
    """Curves that are too many for it."""


@dataclass(frozen=True)
class Overview:
    """All pictures, and what has none."""

    panels: list[Panel]
    constant: list[str]
    """Measurements that never change: a name with its value each."""
    left_out: int = 0
    """Pictures that are too many for a page."""


def arrange(runs: list[Metrics]) -> Overview:
    """Put the curves of all runs into pictures."""
    keys = list(dict.fromkeys(key for run in runs for key in run.curves))
    kinds = {kind for kind, _ in keys}
    groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for key in keys:
        groups.setdefault(_group(key, keys, kinds), []).append(key)
    order = {name: place for place, name in enumerate(KNOWN)}
    panels, constant = [], []
    for group in sorted(groups, key=lambda name: order.get(name, len(order))):
        members = groups[group]
        value = _only_value(runs, members)
        if value is not None:
            constant.append(f"{title(group)} {value:.6g}")
        elif len(runs) > 1 and len(members) > _FEW:
            panels += [
                _panel(f"{title(group)}, {_label(key, group, kinds)}", [key], group, runs, kinds) for key in members
            ]
        else:
            panels.append(_panel(title(group), members, group, runs, kinds))
    panels = [panel for panel in panels if panel.lines]
    return Overview(panels[:MOST_PANELS], constant, max(0, len(panels) - MOST_PANELS))


def title(group: tuple[str, str]) -> str:
    """What a picture is called."""
    return KNOWN.get(group) or f"{group[0]}: {group[1].replace('_', ' ')}"


def family(kind: str, kinds: set[str]) -> str:
    """``eval`` of ``eval_average``, if there is such a kind."""
    base = kind.split("_", maxsplit=1)[0]
    return base if base in kinds else kind


def _group(key: tuple[str, str], keys: list[tuple[str, str]], kinds: set[str]) -> tuple[str, str]:
    return family(key[0], kinds), _stem(key, keys)


def _stem(key: tuple[str, str], keys: list[tuple[str, str]]) -> str:
    """The key without the part that only says which stage or block, or which part of a whole, it is of."""
    kind, name = key
    if match := _MEMBER.match(name):
        return match["stem"]
    if "/" in name:
        stem = name.rsplit("/", 1)[0]
        if any(other.startswith(f"{stem}/") and other != name for group, other in keys if group == kind):
            return stem
    return name


def _label(key: tuple[str, str], group: tuple[str, str], kinds: set[str]) -> str:
    kind, name = key
    variant = kind.removeprefix(group[0]).strip("_")
    if not variant and any(other.startswith(f"{group[0]}_") for other in kinds):
        variant = "raw"
    member = name.removeprefix(group[1]).strip("_./").replace("_", " ")
    return " ".join(part for part in (member, variant) if part)


def _only_value(runs: list[Metrics], members: list[tuple[str, str]]) -> float | None:
    """The value that these curves have everywhere; None where they differ or hardly exist."""
    curves = [run.curves[key].values for run in runs for key in members if key in run.curves]
    values = np.concatenate(curves)
    return float(values[0]) if len(values) > 1 and (values == values[0]).all() else None


def _panel(
    name: str, members: list[tuple[str, str]], group: tuple[str, str], runs: list[Metrics], kinds: set[str]
) -> Panel:
    lines = [
        Line(number, series, _label(key, group, kinds) if len(members) > 1 else "", run.curves[key])
        for number, run in enumerate(runs)
        for series, key in enumerate(members[:MOST_LINES])
        if key in run.curves
    ]
    return Panel(name, lines, max(0, len(members) - MOST_LINES))
