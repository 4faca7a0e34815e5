"""What an evaluation says beyond its totals: each class, how far confidence can be trusted, what is taken for what."""

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
_WORST_TOLD = 5


@dataclass(frozen=True)
class Verdicts:
    """Of every evaluated picture, in the order of the split; every array is (n,)."""

    label: NDArray[np.int64]
    predicted: NDArray[np.int64]
    in_top5: NDArray[np.bool_]
    confidence: NDArray[np.float64]
    """Highest probability of the softmax over the classes that compete."""
    number: NDArray[np.int64]
    """Of the picture in a file of several labels; 0 without such a file."""


class Recorder:
    """Records the verdict on every picture of this rank; give it to ``evaluate`` as its ``observe``."""

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
    """All that is told of an evaluation, as JSON; equal for any number of ranks. Shares are in percent."""
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

    Of the n pictures n_b have a confidence in bin b, which holds its upper end:

        ECE = sum_b n_b / n |top-1 of b - mean confidence of b|
    """
    right = verdicts.predicted == verdicts.label
    bins = np.clip(np.ceil(verdicts.confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    table, gaps = [], []
    for number in range(BINS):
        inside = bins == number
        samples, correct = int(inside.sum()), int(right[inside].sum())
        confidence = math.fsum(verdicts.confidence[inside])
        gaps.append(abs(correct - confidence))
        table.append(
            {
                "up_to": (number + 1) / BINS,
                "samples": samples,
                "top1": 100 * correct / samples if samples else None,
                "confidence": 100 * confidence / samples if samples else None,
            }
        )
    return {
        "expected_calibration_error": 100 * math.fsum(gaps) / len(right),
        "bins": f"{BINS} bins of equal width of the highest probability",
        "table": table,
    }


def class_table(verdicts: Verdicts, dataset: Dataset) -> list[dict[str, Any]]:
    """A row per class, in the order of the labels; ``confused_with`` counts its wrong predictions by class id."""
    count = dataset.num_classes
    right = verdicts.predicted == verdicts.label
    samples, correct, five, predicted = (
        np.bincount(labels, minlength=count).tolist()
        for labels in (
            verdicts.label, verdicts.label[right], verdicts.label[verdicts.in_top5], verdicts.predicted,
        )
    )  # fmt: skip
    wrong: list[dict[str, int]] = [{} for _ in range(count)]
    pairs, counts = np.unique(
        np.stack([verdicts.label[~right], verdicts.predicted[~right]]), axis=1, return_counts=True
    )
    for place in np.argsort(-counts, kind="stable").tolist():
        wrong[int(pairs[0, place])][dataset.class_ids[int(pairs[1, place])]] = int(counts[place])
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
    """The rows of classes that have pictures, the one with the lowest top-1 first, then the one with more mistakes."""
    rows = [row for row in per_class if row["samples"]]
    return sorted(rows, key=lambda row: (row["top1"], row["correct"] - row["samples"]))


def report_lines(content: dict[str, Any]) -> list[str]:
    """What a person wants to know of it first."""
    error = content["calibration"]["expected_calibration_error"]
    bins = content["calibration"]["bins"]
    lines = [f"mean over classes {content['mean_class_top1']:.2f} %  expected calibration error {error:.2f} % ({bins})"]
    if content["real"] is not None:
        real = content["real"]
        lines.append(
            f"ReaL top-1 {real['top1']:.2f} % of {real['samples']} pictures ({real['without']} have no such label)"
        )
    names = {row["id"]: row["name"] for row in content["per_class"]}
    for row in worst_classes(content["per_class"])[:_WORST_TOLD]:
        if row["correct"] < row["samples"]:
            other, times = next(iter(row["confused_with"].items()))
            lines.append(
                f"worst: {row['name']} {row['top1']:.1f} % of {row['samples']}, {times} taken for {names[other]}"
            )
    if content["unreadable"]:
        lines.append(f"WARNING {content['unreadable']} pictures cannot be read and are left out")
    return lines
