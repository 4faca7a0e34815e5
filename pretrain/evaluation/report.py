"""What an evaluation reports besides its totals: each class, its confusions, and calibration.

Counted once from the verdicts of all ranks, so that the report does not depend on the number of ranks.
"""

import math
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from data_pipeline.dataset import Dataset
from pretrain.evaluation.accuracy import Verdicts

BINS = 15
"""Of equal width, for the expected calibration error, as in Guo et al. 2017."""
_WORST_PRINTED = 5


def report(verdicts: Verdicts, dataset: Dataset) -> dict[str, Any]:
    """The report as JSON; shares are in percent."""
    result, per_class = verdicts.total(), class_table(verdicts, dataset)
    shares = [row["top1"] for row in per_class if row["samples"]]
    return {
        **asdict(result),
        "unreadable": len(dataset) - result.samples,
        "mean_class_top1": math.fsum(shares) / len(shares),
        "calibration_error": calibration_error(verdicts),
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


def report_lines(content: dict[str, Any]) -> list[str]:
    """The lines that are printed: means, the classes with the lowest top-1, and what was left out."""
    error = f"expected calibration error {content['calibration_error']:.2f} % ({BINS} bins)"
    lines = [f"mean over classes {content['mean_class_top1']:.2f} %  {error}"]
    names = {row["id"]: row["name"] for row in content["per_class"]}
    wrong = [row for row in content["per_class"] if row["correct"] < row["samples"]]
    for row in sorted(wrong, key=lambda row: (row["top1"], row["correct"] - row["samples"]))[:_WORST_PRINTED]:
        other, times = next(iter(row["confused_with"].items()))
        lines.append(
            f"worst: {row['name']} {row['top1']:.1f} % of {row['samples']}, {times} classified as {names[other]}"
        )
    if content["unreadable"]:
        lines.append(f"WARNING {content['unreadable']} images cannot be read and are left out")
    return lines
