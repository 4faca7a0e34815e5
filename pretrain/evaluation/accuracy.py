"""Evaluation: each image of a split exactly once, with the same result on any number of ranks.

Counted here rather than by torchmetrics: its import takes seconds on ranks that train, and its mean of the loss depends
on the number of ranks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

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


@torch.no_grad()
def evaluate(
    forward: Callable[[torch.Tensor], torch.Tensor],
    loader: EvalLoader,
    *,
    levels: torch.Tensor | None = None,
    stop: Callable[[], bool] = lambda: False,
    observe: Callable[[Batch, torch.Tensor], None] | None = None,
) -> Evaluation | None:
    """Evaluate a classifier. Collective where a process group exists.

    Each image is in the same batch for any number of ranks, and losses are summed exactly before they are rounded, so
    the result does not depend on the number of ranks.

    Args:
        forward: images (b, 3, H, W) fp32 -> logits (b, classes).
        loader: this rank's share; it has equally many batches on every rank.
        levels: (classes,) int64 on the logits' device: level of each class in the hierarchy of semantic softmax. A
            label then competes with the classes of its own level only.
        stop: polled at each batch; must return the same on all ranks.
        observe: called with each batch and its logits (b, classes) fp32, minus infinity where they do not compete.

    Returns:
        the result over all ranks, equal on all of them, or None when stopped.

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
        tables.append(_scores(batch, logits))
    if not tables:
        raise UserError("the split to evaluate is empty")
    return _total(gather_rows(torch.cat(tables, 1), 1))


def top5(logits: torch.Tensor) -> torch.Tensor:
    """The classes with the highest scores, the highest first: (b, classes) -> (b, 5), all of them below five."""
    return logits.topk(min(5, logits.shape[1]), dim=1).indices


def _scores(batch: Batch, logits: torch.Tensor) -> torch.Tensor:
    """Of each row: whether it counts, whether its loss is finite, top-1, top-5, loss; (5, b) fp64."""
    losses = F.cross_entropy(logits, batch.labels, reduction="none")
    finite = losses.isfinite()  # the loss sums over all scores that compete
    hits = (top5(logits) == batch.labels[:, None]) & finite[:, None]
    valid = to_device(batch.valid, logits.device)
    return torch.stack([row.double() for row in (valid, finite, hits[:, 0], hits.any(1), losses)])


def _total(table: torch.Tensor) -> Evaluation:
    rows = table[:, table[0] == 1].cpu().numpy()
    count = rows.shape[1]
    if not count:
        raise UserError("no image of the split to evaluate can be read")
    finite, first, five = (int(row.sum()) for row in rows[1:4])
    # fsum rounds once, at the end: the sum does not depend on the order.
    return Evaluation(100 * first / count, 100 * five / count, math.fsum(rows[4]) / count, count, count - finite)
