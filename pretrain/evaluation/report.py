"""What an evaluation reports besides its totals: each class, calibration, and confusions.

Verdicts of all ranks are gathered first and counted once, by torchmetrics, so that the report does not depend on the
number of ranks.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from data_pipeline.batch import Batch
from data_pipeline.dataset import Dataset
from pretrain.evaluation.accuracy import Evaluation, top5
from pretrain.evaluation.real_labels import RealLabels

BINS = 15
"""Of equal width, for the expected calibration error, as in Guo et al. 2017."""
_WORST_PRINTED = 5


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

    # Sorted, so that sums do not depend on the order in which ranks were gathered.
    hits = verdicts.predicted == verdicts.label
    order = np.lexsort((hits, verdicts.confidence))
    right, confidence = torch.from_numpy(hits[order]).long(), torch.from_numpy(verdicts.confidence[order])
    error = binary_calibration_error(confidence, right, n_bins=BINS, norm="l1").item()
    edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64)
    bins = (torch.bucketize(confidence, edges, right=True) - 1).clamp(max=BINS - 1)
    table = []
    for number in range(BINS):
        inside = bins == number
        mean = (lambda values: 100 * values.double().mean().item()) if inside.any() else (lambda _: None)
        row = {"up_to": edges[number + 1].item(), "samples": int(inside.sum())}
        table.append(row | {"top1": mean(right[inside]), "confidence": mean(confidence[inside])})
    return {
        "expected_calibration_error": 100 * error,
        "bins": f"{BINS} bins of equal width of the highest probability",
        "table": table,
    }


def class_table(verdicts: Verdicts, dataset: Dataset) -> list[dict[str, Any]]:
    """A row per class, in the order of the labels; ``confused_with`` counts its wrong predictions by class id.

    The confusion matrix is sparse: a dense one of ImageNet-21k's 21,841 classes takes 3.8 GB.
    """
    from torchmetrics.functional.classification import multiclass_stat_scores  # noqa: PLC0415 - slow to import

    count, right = dataset.num_classes, verdicts.predicted == verdicts.label
    predicted, label = torch.from_numpy(verdicts.predicted), torch.from_numpy(verdicts.label)
    scores = multiclass_stat_scores(predicted, label, num_classes=count, average=None)
    five = np.bincount(verdicts.label[verdicts.in_top5], minlength=count).tolist()
    wrong: list[dict[str, int]] = [{} for _ in range(count)]
    pairs = np.stack([verdicts.label[~right], verdicts.predicted[~right]])
    pairs, times = np.unique(pairs, axis=1, return_counts=True)
    for place in np.argsort(-times, kind="stable").tolist():
        wrong[int(pairs[0, place])][dataset.class_ids[int(pairs[1, place])]] = int(times[place])
    return [
        {
            "id": dataset.class_ids[label],
            "name": dataset.class_names[label],
            "samples": samples,
            "correct": correct,
            "top1": 100 * correct / samples if samples else None,
            "top5": 100 * five[label] / samples if samples else None,
            "predicted": correct + taken,
            "confused_with": wrong[label],
        }
        for label, (correct, taken, _, _, samples) in enumerate(scores.tolist())
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
