"""What an evaluation reports besides its totals: each class, calibration, confusions and their plot.

Verdicts of all ranks are gathered first and counted once, so that the report does not depend on the number of ranks.
"""

import io
import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from data_pipeline.batch import Batch
from data_pipeline.dataset import Dataset
from pretrain.evaluation.accuracy import Evaluation, top5
from pretrain.evaluation.labels import RealLabels

BINS = 15
"""Of equal width, for the expected calibration error, as in Guo et al. 2017."""
_WORST_PRINTED = 5
PLOTTED = 20
"""Classes in the confusion matrix plot, at most."""
OTHERS = 10
"""Further classes in the plot, those most often predicted for them, that have a column of their own."""
_NAME = 24


@dataclass(frozen=True)
class Verdicts:
    """Of each evaluated image; every array is (n,)."""

    label: NDArray[np.int64]
    predicted: NDArray[np.int64]
    in_top5: NDArray[np.bool_]
    confidence: NDArray[np.float64]
    """Highest probability of the softmax over the classes that compete."""
    number: NDArray[np.int64]
    """Of the image in a file of several labels; 0 without such a file."""


class Recorder:
    """Records the verdict on each image of this rank; ``observe`` of ``evaluate``."""

    def __init__(self, real: RealLabels | None = None) -> None:
        self._real = real
        self._parts: list[Verdicts] = []

    def __call__(self, batch: Batch, logits: torch.Tensor) -> None:
        """Record a batch from its logits (b, classes)."""
        best = top5(logits)
        columns = (
            batch.labels,
            best[:, 0],
            (best == batch.labels[:, None]).any(1),
            logits.double().softmax(1).amax(1),
        )
        samples = batch.sample_ids[batch.valid]
        label, predicted, in_top5, confidence = (column.cpu().numpy()[batch.valid] for column in columns)
        numbers = [self._real.number(sample) for sample in samples.tolist()] if self._real else [0] * len(samples)
        number = np.array(numbers, np.int64)
        self._parts.append(Verdicts(label, predicted, in_top5, confidence, number))

    def gathered(self, control: dist.ProcessGroup | None) -> Verdicts:
        """The verdicts of all ranks, on every rank. Collective over ``control``, a CPU group; None: alone."""
        parts = self._parts
        if control is not None:
            gathered: list[Any] = [None] * dist.get_world_size(control)
            dist.all_gather_object(gathered, parts, group=control)
            parts = [part for rank in gathered for part in rank]
        fields = Verdicts.__dataclass_fields__
        return Verdicts(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in fields})


def report(result: Evaluation, verdicts: Verdicts, dataset: Dataset, real: RealLabels | None) -> dict[str, Any]:
    """The report as JSON; equal for any number of ranks. Shares are in percent."""
    per_class = class_table(verdicts, dataset)
    shares = [row["top1"] for row in per_class if row["samples"]]
    return {
        **asdict(result),
        "unreadable": len(dataset) - result.samples,
        "mean_class_top1": math.fsum(shares) / len(shares),
        "classes_without_pictures": len(per_class) - len(shares),
        "calibration": calibration(verdicts),
        "real": None if real is None else real.top1(verdicts.number, verdicts.predicted),
        "per_class": per_class,
    }


def calibration(verdicts: Verdicts) -> dict[str, Any]:
    """Expected calibration error, in percent (Naeini et al. 2015, Guo et al. 2017).

    Of the n images n_b have a confidence in bin b, which includes its lower end:

        ECE = sum_b n_b / n |top-1 of b - mean confidence of b|
    """
    from torchmetrics.functional.classification import binary_calibration_error  # noqa: PLC0415 - slow to import

    hits = verdicts.predicted == verdicts.label
    order = np.lexsort((hits, verdicts.confidence))  # so that sums do not depend on the order of ranks
    right, confidence = torch.from_numpy(hits[order]).long(), torch.from_numpy(verdicts.confidence[order])
    confidence = confidence.clamp(max=math.nextafter(1, 0))  # torchmetrics counts 1 in a bin of its own
    error = binary_calibration_error(confidence, right, n_bins=BINS, norm="l1").item()
    bins = torch.bucketize(confidence, torch.linspace(0, 1, BINS + 1, dtype=torch.float64), right=True) - 1
    table = []
    for number in range(BINS):
        inside = bins == number
        samples, correct = int(inside.sum()), int(right[inside].sum())
        row = {"up_to": (number + 1) / BINS, "samples": samples, "top1": None, "confidence": None}
        if samples:
            row |= {"top1": 100 * correct / samples, "confidence": 100 * confidence[inside].mean().item()}
        table.append(row)
    return {
        "expected_calibration_error": 100 * error,
        "bins": f"{BINS} bins of equal width of the highest probability",
        "table": table,
    }


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
    """The lines that are printed."""
    error = content["calibration"]["expected_calibration_error"]
    bins = content["calibration"]["bins"]
    lines = [f"mean over classes {content['mean_class_top1']:.2f} %  expected calibration error {error:.2f} % ({bins})"]
    if content["real"] is not None:
        real = content["real"]
        lines.append(
            f"ReaL top-1 {real['top1']:.2f} % of {real['samples']} images ({real['without']} have no such label)"
        )
    names = {row["id"]: row["name"] for row in content["per_class"]}
    for row in worst_classes(content["per_class"])[:_WORST_PRINTED]:
        if row["correct"] < row["samples"]:
            other, times = next(iter(row["confused_with"].items()))
            lines.append(
                f"worst: {row['name']} {row['top1']:.1f} % of {row['samples']}, {times} classified as {names[other]}"
            )
    if content["unreadable"]:
        lines.append(f"WARNING {content['unreadable']} images cannot be read and are left out")
    return lines


def draw_confusion(per_class: list[dict[str, Any]], title: str) -> bytes:
    """Plot the confusion matrix of the worst classes.

    Args:
        per_class: rows of ``class_table``.
        title: of the plot.

    Returns:
        a PNG.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - optional

    labels, columns, counts = confusion_of_worst(per_class)
    shares = counts / counts.sum(1, keepdims=True)
    height, width = 1.9 + 0.27 * len(labels), 3.0 + 0.36 * len(columns)
    figure = Figure(figsize=(max(width, 5.5), height), layout="constrained", dpi=130)
    axes = figure.add_subplot()
    matrix = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), [_plain(name) for name in columns], rotation=90, fontsize=7)
    axes.set_yticks(range(len(labels)), [_plain(name) for name in labels], fontsize=7)
    axes.set_xlabel("classified as", fontsize=8)
    axes.set_title(_plain(title, limit=120), fontsize=9)
    axes.tick_params(length=0)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            color = "white" if shares[row, column] > 0.55 else "black"
            axes.text(column, row, str(count), ha="center", va="center", fontsize=6, color=color)
    bar = figure.colorbar(matrix, ax=axes, fraction=0.03, pad=0.01)
    bar.set_label("share of the class's images", fontsize=7)
    bar.ax.tick_params(labelsize=6)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def confusion_of_worst(per_class: list[dict[str, Any]]) -> tuple[list[str], list[str], NDArray[np.int64]]:
    """The confusion matrix of the worst classes.

    Returns:
        names of the rows with their top-1, names of the columns, and counts (rows, columns): first the rows' own
        classes in the same order, then those most often predicted in their place, then all others together.
    """
    rows = worst_classes(per_class)[:PLOTTED]
    shown = [row["id"] for row in rows]
    elsewhere: Counter[str] = Counter()
    for row in rows:
        elsewhere.update({other: count for other, count in row["confused_with"].items() if other not in shown})
    columns = shown + [other for other, _ in elsewhere.most_common(OTHERS)]
    rest = len(elsewhere) > OTHERS
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
    """Text without matplotlib's math mode."""
    return text[:limit].replace("$", r"\$")
