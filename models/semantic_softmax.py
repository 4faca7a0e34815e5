"""Semantic softmax: one softmax for each level of a class hierarchy (Ridnik et al. 2021, "for the masses").

In ImageNet-21k the image of a chair may be labeled "chair" or "furniture"; a single softmax over both calls one of
them wrong. Here a class competes only with the classes of its own level, and a label also counts for its ancestors.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class SemanticSoftmax:
    """Cross-entropy over the levels of a hierarchy of classes.

    Of level k, with the n_k classes that have k ancestors among the classes:

        L_k = -mean_b sum_a t_k[b, a] log softmax(logits[b, level k])[a],    L = sum_k L_k / O_k

    t_k[b, a] is the target's mass on class a and all that is below it; a target without an ancestor at level k has no
    mass there. O_k, the share of classes that have an ancestor (or themselves) at level k, makes up for that, so that
    deep levels, which few labels reach, count as much as the first. With one level it is plain cross-entropy.

    Args:
        ancestors: for each class its ancestor at each level, itself included: (classes, levels) ints, -1 where it
            has none; ancestors come without gaps from level 0 on.
        smoothing: label smoothing within each level.

    Raises:
        ValueError: ``ancestors`` is not such a table.
    """

    def __init__(self, ancestors: Sequence[Sequence[int]] | Tensor, smoothing: float = 0.0) -> None:
        table = torch.as_tensor(ancestors, dtype=torch.int64)
        if table.ndim != 2 or not table.numel() or table.min() < -1 or table.max() >= len(table):
            raise ValueError(
                f"ancestors: (classes, levels) numbers of classes or -1 are wanted, got {tuple(table.shape)}"
            )
        own = (table >= 0).sum(1) - 1
        if (table.gather(1, own.clamp(min=0)[:, None])[:, 0] != torch.arange(len(table))).any():
            raise ValueError("ancestors: the last ancestor of every class must be the class itself")
        self.levels = own
        """Level of each class: (classes,) int64, 0 for those without ancestors."""
        self._smoothing = smoothing
        self._members = []  # of each level: its classes, who is below them, under which of them, and 1 / O_k
        slot = torch.empty_like(own)
        for level in range(int(own.max()) + 1):
            columns = (own == level).nonzero()[:, 0]
            slot[columns] = torch.arange(len(columns))
            below = (table[:, level] >= 0).nonzero()[:, 0]
            self._members.append((columns, below, slot[table[below, level]], len(table) / len(below)))

    def to(self, device: torch.device) -> "SemanticSoftmax":
        """Move the tables to a device, in place."""
        self.levels = self.levels.to(device)
        self._members = [(a.to(device), b.to(device), c.to(device), w) for a, b, c, w in self._members]
        return self

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss.

        Args:
            logits: (batch, classes).
            targets: (batch, classes), shares of labels that add up to 1, as mixing makes them, without smoothing.

        Returns:
            a scalar, fp32.
        """
        total = torch.zeros((), device=logits.device)
        for columns, below, slots, weight in self._members:
            mass = torch.zeros(len(logits), len(columns), device=logits.device)
            mass.index_add_(1, slots, targets[:, below].float())
            spread = mass.sum(1, keepdim=True) * self._smoothing / len(columns)
            smooth = (1 - self._smoothing) * mass + spread
            total = total - weight * (smooth * F.log_softmax(logits[:, columns].float(), dim=1)).sum(1).mean()
        return total


def within_level(logits: Tensor, labels: Tensor, levels: Tensor) -> Tensor:
    """Scores of the classes at the label's own level; all others are set to minus infinity.

    Classes of different levels never competed in training, so which of them scores higher means nothing.

    Args:
        logits: (batch, classes).
        labels: (batch,) int64.
        levels: (classes,) int64, ``SemanticSoftmax.levels``.
    """
    return logits.masked_fill(levels[None, :] != levels[labels][:, None], -torch.inf)
