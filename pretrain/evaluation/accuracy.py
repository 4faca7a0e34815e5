"""Evaluation: each image of a split exactly once, with the same result on any number of ranks.

Counted here rather than by torchmetrics: its import takes seconds on ranks that train, and its mean of the loss depends
on the number of ranks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from data_pipeline.batch import Batch, to_device
from data_pipeline.loader import EvalLoader
from models import within_level
from pretrain.engine.distributed import gather_rows
from pretrain.outcome import UserError


@dataclass(frozen=True)
class Evaluation:
    """Result over a whole split."""

    top1: float
    """Share of images whose highest score is their label, in percent."""
    top5: float
    """Share of images whose label is among the five highest scores (all, below five classes), in percent."""
    loss: float
    """Mean cross-entropy in nats, without label smoothing."""
    samples: int
    """Images evaluated: the split's size, less those that cannot be read."""
    not_finite: int = 0
    """Of these, images whose loss is not finite; they count as wrong."""

    def __str__(self) -> str:
        correct = round(self.top1 * self.samples / 100)
        broken = f"  WARNING scores of {self.not_finite} images are not finite" if self.not_finite else ""
        return (
            f"top-1 {self.top1:.2f} % ({correct} of {self.samples})  top-5 {self.top5:.2f} %  "
            f"loss {self.loss:.4f}{broken}"
        )


@dataclass(frozen=True)
class Verdicts:
    """On each evaluated image of all ranks, in an order that depends on their number; every array is (n,)."""

    label: NDArray[np.int64]
    predicted: NDArray[np.int64]
    in_top5: NDArray[np.bool_]
    loss: NDArray[np.float64]
    """Cross-entropy in nats. It sums over all scores that compete, so it is finite only where they are."""
    confidence: NDArray[np.float64]
    """Highest probability of the softmax over the classes that compete."""
    number: NDArray[np.int64]
    """Number of the image, by ``number_of`` of ``evaluate``."""

    def total(self) -> Evaluation:
        """The result over all images, the same in any order of them."""
        finite, count = np.isfinite(self.loss), len(self.label)
        first = int(((self.predicted == self.label) & finite).sum())
        five = int((self.in_top5 & finite).sum())
        loss = math.fsum(self.loss) / count  # fsum rounds once, at the end
        return Evaluation(100 * first / count, 100 * five / count, loss, count, count - int(finite.sum()))


@torch.no_grad()
def evaluate(
    forward: Callable[[torch.Tensor], torch.Tensor],
    loader: EvalLoader,
    *,
    levels: torch.Tensor | None = None,
    number_of: Callable[[int], int] | None = None,
    stop: Callable[[], bool] = lambda: False,
    observe: Callable[[Batch, torch.Tensor], None] | None = None,
) -> Verdicts | None:
    """Evaluate a classifier. Collective where a process group exists.

    Each image is in the same batch for any number of ranks, so its verdict does not depend on that.

    Args:
        forward: images (b, 3, H, W) fp32 -> logits (b, classes).
        loader: this rank's share; it has equally many batches on every rank.
        levels: (classes,) int64 on the logits' device: level of each class in the hierarchy of semantic softmax. A
            label then competes with the classes of its own level only.
        number_of: sample -> number of its image in the verdicts; None for the sample itself.
        stop: polled at each batch; must return the same on all ranks.
        observe: called with each batch and its logits (b, classes) fp32, minus infinity where they do not compete.

    Returns:
        the verdicts of all ranks, on each of them; None when stopped.

    Raises:
        UserError: the split is empty, or none of its images can be read.
    """
    tables = []
    for batch in loader:
        if stop():
            return None
        logits = forward(batch.images).float()
        if levels is not None:
            logits = within_level(logits, batch.labels, levels)
        if observe is not None:
            observe(batch, logits)
        numbers = batch.sample_ids
        if number_of is not None:
            numbers = np.array([number_of(sample) for sample in numbers.tolist()])
        tables.append(torch.cat([_scores(batch, logits), to_device(numbers, logits.device)[None].double()]))
    if not tables:
        raise UserError("the split to evaluate is empty")
    table = gather_rows(torch.cat(tables, 1), 1)
    valid, label, predicted, in_top5, loss, confidence, number = table[:, table[0] == 1].cpu().numpy()
    if not len(valid):
        raise UserError("no image of the split to evaluate can be read")
    label, predicted, number = (column.astype(np.int64) for column in (label, predicted, number))
    return Verdicts(label, predicted, in_top5.astype(np.bool_), loss, confidence, number)


def _scores(batch: Batch, logits: torch.Tensor) -> torch.Tensor:
    """Of each row: whether it counts, and the fields of ``Verdicts`` but the number; (6, b) fp64."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    columns = (
        to_device(batch.valid, logits.device),
        batch.labels,
        best[:, 0],
        (best == batch.labels[:, None]).any(1),
        F.cross_entropy(logits, batch.labels, reduction="none"),
        logits.double().softmax(1).amax(1),
    )
    return torch.stack([column.double() for column in columns])
