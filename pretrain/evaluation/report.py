"""What an evaluation reports besides its totals: each class, its confusions and their plot, and calibration.

Counted once from the verdicts of all ranks, so that the report does not depend on the number of ranks.
"""

import io
import math
from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.dataset import Dataset
from pretrain.evaluation.accuracy import Verdicts
from pretrain.evaluation.real_labels import RealLabels

BINS = 15
"""Of equal width, for the expected calibration error, as in Guo et al. 2017."""
_WORST_PRINTED = 5
PLOTTED, OTHERS = 20, 10
"""Classes in the plot of the confusions, at most: rows, and further columns."""


def report(verdicts: Verdicts, dataset: Dataset, real: RealLabels | None = None) -> dict[str, Any]:
    """The report as JSON; shares are in percent."""
    result, per_class = verdicts.total(), class_table(verdicts, dataset)
    shares = [row["top1"] for row in per_class if row["samples"]]
    return {
        **asdict(result),
        "unreadable": len(dataset) - result.samples,
        "mean_class_top1": math.fsum(shares) / len(shares),
        "calibration_error": calibration_error(verdicts),
        "real": None if real is None else real.top1(verdicts),
        "per_class": per_class,
    }


def calibration_error(verdicts: Verdicts) -> float:
    """Expected calibration error, in percent (Naeini et al. 2015, Guo et al. 2017).

    Of the n images n_b have a confidence in bin b, which includes its lower end:

        ECE = sum_b n_b / n |top-1 of b - mean confidence of b|
    """
    from torchmetrics.functional.classification import binary_calibration_error  # noqa: PLC0415 - slow to import

    right = verdicts.predicted == verdicts.label
    order = np.lexsort((right, verdicts.confidence))  # so that sums do not depend on the order of ranks
    confidence = torch.from_numpy(verdicts.confidence[order])
    confidence = confidence.clamp(max=math.nextafter(1, 0))  # torchmetrics counts 1 in a bin of its own
    return 100 * binary_calibration_error(confidence, torch.from_numpy(right[order]).long(), BINS, "l1").item()


def class_table(verdicts: Verdicts, dataset: Dataset) -> list[dict[str, Any]]:
    """A row per class, in the order of the labels; ``confused_with`` counts its wrong predictions by class id.

    Counts are sparse: torchmetrics' confusion matrix and stat scores are dense, 3.6 GiB for 21,841 classes.
    """
    count, right = dataset.num_classes, verdicts.predicted == verdicts.label
    counted = (verdicts.label, verdicts.label[right], verdicts.label[verdicts.in_top5], verdicts.predicted)
    samples, correct, five, predicted = (np.bincount(labels, minlength=count).tolist() for labels in counted)
    wrong: list[dict[str, int]] = [{} for _ in range(count)]
    pairs = np.stack([verdicts.label[~right], verdicts.predicted[~right]])
    pairs, times = np.unique(pairs, axis=1, return_counts=True)
    for place in np.argsort(-times, kind="stable").tolist():
        wrong[int(pairs[0, place])][dataset.class_ids[int(pairs[1, place])]] = int(times[place])
    return [
        {
            "id": dataset.class_ids[label],
            "name": dataset.class_names[label],
            "samples": samples[label],
            "correct": correct[label],
            "top1": 100 * correct[label] / samples[label] if samples[label] else None,
            "top5": 100 * five[label] / samples[label] if samples[label] else None,
            "predicted": predicted[label],
            "confused_with": wrong[label],
        }
        for label in range(count)
    ]


def worst_classes(per_class: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of classes that have images, the one with the lowest top-1 first, then the one with more mistakes."""
    rows = [row for row in per_class if row["samples"]]
    return sorted(rows, key=lambda row: (row["top1"], row["correct"] - row["samples"]))


def report_lines(content: dict[str, Any]) -> list[str]:
    """The lines that are printed: means, the classes with the lowest top-1, and what was left out."""
    error = f"expected calibration error {content['calibration_error']:.2f} % ({BINS} bins)"
    lines = [f"mean over classes {content['mean_class_top1']:.2f} %  {error}"]
    if real := content["real"]:
        counts = f"of {real['samples']} images ({real['without']} have no such label)"
        lines.append(f"ReaL top-1 {real['top1']:.2f} % {counts}")
    names = {row["id"]: row["name"] for row in content["per_class"]}
    for row in worst_classes(content["per_class"])[:_WORST_PRINTED]:
        if row["confused_with"]:
            other, times = next(iter(row["confused_with"].items()))
            share = f"{row['top1']:.1f} % of {row['samples']}"
            lines.append(f"worst: {row['name']} {share}, {times} classified as {names[other]}")
    if content["unreadable"]:
        lines.append(f"WARNING {content['unreadable']} images cannot be read and are left out")
    return lines


def confusion_of_worst(per_class: list[dict[str, Any]]) -> tuple[list[str], list[str], NDArray[np.int64]]:
    """The confusion matrix of the worst classes.

    Returns:
        names of the rows and of the columns, and counts (rows, columns): first the rows' own classes in the same order,
        then those most often predicted in their place, then all others together where there are any.
    """
    rows = worst_classes(per_class)[:PLOTTED]
    counted = [Counter({row["id"]: row["correct"]} | row["confused_with"]) for row in rows]
    shown = [row["id"] for row in rows]
    elsewhere = Counter({id_: times for id_, times in sum(counted, Counter()).items() if id_ not in shown})
    columns = shown + [id_ for id_, _ in elsewhere.most_common(OTHERS)]
    counts = np.array([[row[id_] for id_ in columns] for row in counted])
    names = {row["id"]: row["name"] for row in per_class}
    labels = [names[id_] for id_ in columns]
    if len(elsewhere) > OTHERS:
        rest = [row["samples"] for row in rows] - counts.sum(1)
        counts, labels = np.column_stack([counts, rest]), [*labels, "all others"]
    return labels[: len(rows)], labels, counts


def draw_confusion(per_class: list[dict[str, Any]], title: str) -> bytes:
    """Draw the confusion matrix of the worst classes as a PNG.

    Args:
        per_class: rows of ``class_table``.
        title: of the plot.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - optional

    labels, columns, counts = confusion_of_worst(per_class)
    shares = counts / counts.sum(1, keepdims=True)
    figure = Figure(figsize=(4 + 0.35 * len(columns), 3 + 0.25 * len(labels)), layout="constrained", dpi=130)
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), [_short(name) for name in columns], rotation=90, fontsize=7)
    axes.set_yticks(range(len(labels)), [_short(name) for name in labels], fontsize=7)
    axes.set(xlabel="classified as", title=_short(title, 120))
    for (row, column), count in np.ndenumerate(counts):
        if count:
            color = "white" if shares[row, column] > 0.55 else "black"
            axes.text(column, row, str(count), ha="center", va="center", fontsize=6, color=color)
    figure.colorbar(image, label="share of the class's images")
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _short(name: str, limit: int = 24) -> str:
    """The beginning of a name, without matplotlib's math mode."""
    return (name if len(name) <= limit else f"{name[: limit - 1]}…").replace("$", r"\$")
