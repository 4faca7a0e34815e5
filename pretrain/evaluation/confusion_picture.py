"""The confusion of the worst classes as a picture, drawn by the optional package matplotlib."""

import io
from importlib.util import find_spec
from typing import Any

import numpy as np

from pretrain.evaluation.report import worst_classes

ROWS = 20
"""Classes that are shown at most."""
OTHERS = 10
"""Further classes, the ones most often predicted for them, that have a column of their own."""
_NAME = 24
MISSING = (
    "the picture of confused classes is left out: matplotlib is not installed "
    "(pip install --constraint constraints.txt matplotlib)"
)


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw_confusion(per_class: list[dict[str, Any]], title: str) -> bytes:
    """Draw how the pictures of the worst classes were classified; the result is a PNG.

    Args:
        per_class: rows of ``class_table``.
        title: above it.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - optional

    labels, columns, counts = confusion_of_worst(per_class)
    shares = counts / counts.sum(1, keepdims=True)
    height, width = 1.9 + 0.27 * len(labels), 3.0 + 0.36 * len(columns)
    figure = Figure(figsize=(max(width, 5.5), height), layout="constrained", dpi=130)
    axes = figure.add_subplot()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), [_plain(name) for name in columns], rotation=90, fontsize=7)
    axes.set_yticks(range(len(labels)), [_plain(name) for name in labels], fontsize=7)
    axes.set_xlabel("classified as", fontsize=8)
    axes.set_title(_plain(title, limit=120), fontsize=9)
    axes.tick_params(length=0)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            ink = "white" if shares[row, column] > 0.55 else "black"
            axes.text(column, row, str(count), ha="center", va="center", fontsize=6, color=ink)
    bar = figure.colorbar(picture, ax=axes, fraction=0.03, pad=0.01)
    bar.set_label("share of the class's pictures", fontsize=7)
    bar.ax.tick_params(labelsize=6)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def confusion_of_worst(per_class: list[dict[str, Any]]) -> tuple[list[str], list[str], np.ndarray]:
    """The confusion matrix cut down to the worst classes.

    Returns:
        names of the rows with their top-1, names of the columns, and counts (rows, columns): first the rows' own
        classes in the same order, then those most often predicted in their place, then all others together.
    """
    rows = worst_classes(per_class)[:ROWS]
    shown = [row["id"] for row in rows]
    elsewhere: dict[str, int] = {}
    for row in rows:
        for other, count in row["confused_with"].items():
            if other not in shown:
                elsewhere[other] = elsewhere.get(other, 0) + count
    further = sorted(elsewhere, key=lambda other: -elsewhere[other])[:OTHERS]
    columns = shown + further
    rest = len(elsewhere) > len(further)
    counts = np.zeros((len(rows), len(columns) + rest), np.int64)
    for number, row in enumerate(rows):
        counts[number, number] = row["correct"]
        for other, count in row["confused_with"].items():
            counts[number, columns.index(other) if other in columns else -1] += count
    names = {row["id"]: row["name"] for row in per_class}
    labels = [f"{_short(row['name'])} ({row['top1']:.0f} %)" for row in rows]
    return labels, [_short(names[column]) for column in columns] + ["all others"] * rest, counts


def _short(name: str) -> str:
    return name if len(name) <= _NAME else name[: _NAME - 1] + "…"


def _plain(text: str, limit: int = 60) -> str:
    """Text that matplotlib does not take for a formula."""
    return text[:limit].replace("$", r"\$")
