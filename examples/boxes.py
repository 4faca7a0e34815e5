"""Boxes: overlap, suppression of doubles, and average precision."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of every box with every other: (A, 4) and (B, 4) to (A, B); left, top, right, bottom."""
    corners = torch.minimum(first[:, None, 2:], second[None, :, 2:]) - torch.maximum(first[:, None, :2], second[:, :2])
    shared = corners.clamp(min=0).prod(2)
    return shared / (_area(first)[:, None] + _area(second) - shared).clamp(min=1e-9)


def giou_loss(predicted: Tensor, truth: Tensor) -> Tensor:
    """1 - generalised IoU (Rezatofighi et al. 2019, arXiv 1902.09630) of pairs of boxes: (K, 4) twice to (K,)."""
    low, high = torch.minimum, torch.maximum
    shared = (low(predicted[:, 2:], truth[:, 2:]) - high(predicted[:, :2], truth[:, :2])).clamp(min=0).prod(1)
    hull = (high(predicted[:, 2:], truth[:, 2:]) - low(predicted[:, :2], truth[:, :2])).prod(1).clamp(min=1e-9)
    union = (_area(predicted) + _area(truth) - shared).clamp(min=1e-9)
    return 1 - shared / union + (hull - union) / hull


def suppress(boxes: Tensor, scores: Tensor, threshold: float = 0.5) -> Tensor:
    """Non-maximum suppression: indices of the boxes to keep, best first.

    Args:
        boxes: (K, 4).
        scores: (K,).
        threshold: a box that overlaps a kept one by more IoU than this is dropped.
    """
    order = scores.argsort(descending=True, stable=True)
    overlaps = iou(boxes[order], boxes[order]) > threshold
    kept: list[int] = []
    dropped = torch.zeros(len(order), dtype=torch.bool)
    for index in range(len(order)):
        if not dropped[index]:
            kept.append(index)
            dropped |= overlaps[index]
    return order[torch.tensor(kept, dtype=torch.int64)]


@dataclass(frozen=True)
class Detections:
    """What was found on a picture, or is on it (`scores` are not read then)."""

    boxes: Tensor
    """(K, 4) in pixels."""
    labels: Tensor
    """(K,)."""
    scores: Tensor
    """(K,) in 0..1."""


def average_precision(
    found: Sequence[Detections], truth: Sequence[Detections], classes: int, threshold: float = 0.5
) -> float:
    """Mean over the classes that occur of the area under the precision-recall curve, in percent (AP50 by default).

    As PASCAL VOC since 2010: detections in the order of their scores; one is right when its best box of the truth, on
    its picture and of its class, overlaps it by at least `threshold` IoU and was not taken before; the precision at a
    recall is the highest at that recall or beyond.
    """
    precisions = [_class_precision(found, truth, label, threshold) for label in range(classes)]
    known = [p for p in precisions if p is not None]
    return 100 * sum(known) / len(known)


def _class_precision(
    found: Sequence[Detections], truth: Sequence[Detections], label: int, threshold: float
) -> float | None:
    wanted = [t.boxes[t.labels == label] for t in truth]
    total = sum(map(len, wanted))
    if total == 0:
        return None
    candidates = [
        (score, picture, box)
        for picture, f in enumerate(found)
        for box, score in zip(f.boxes[f.labels == label], f.scores[f.labels == label].tolist(), strict=True)
    ]
    candidates.sort(key=lambda candidate: -candidate[0])
    taken = [torch.zeros(len(boxes), dtype=torch.bool) for boxes in wanted]
    right = torch.zeros(len(candidates))
    for rank, (_, picture, box) in enumerate(candidates):
        if len(wanted[picture]) == 0:
            continue
        overlap, best = iou(box[None], wanted[picture])[0].max(0)
        if overlap >= threshold and not taken[picture][best]:
            taken[picture][best] = True
            right[rank] = 1
    hits = right.cumsum(0)
    precision = hits / torch.arange(1, len(right) + 1)
    ceiling = precision.flip(0).cummax(0).values.flip(0)
    return float((ceiling * right).sum() / total)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)
