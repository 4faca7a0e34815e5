"""What is minimised, as the recipe says."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from data_pipeline.transforms import MixingConfig
from models import SemanticSoftmax
from pretrain.class_tree import read_ancestors
from pretrain.recipe import LossSection


class Classification:
    """The loss of the logits against soft targets.

    Args:
        section: the recipe's.
        mixing: how targets are made.
        class_ids: the dataset's, in the order of its labels.
        device: where it is computed.

    Raises:
        UserError: the class tree cannot be used.
    """

    def __init__(
        self, section: LossSection, mixing: MixingConfig, class_ids: Sequence[str], device: torch.device
    ) -> None:
        self.name = section.classification
        """Its name among the metrics."""
        self.mixing = mixing
        """How targets are to be made for it."""
        self.levels: torch.Tensor | None = None
        """Level of each class, (classes,) int64 on the device, where classes compete within levels only."""
        self._semantic: SemanticSoftmax | None = None
        if section.class_tree is not None:
            ancestors = read_ancestors(section.class_tree, class_ids)
            self._semantic = SemanticSoftmax(ancestors, mixing.label_smoothing).to(device)
            self.levels = self._semantic.levels
            self.mixing = mixing.model_copy(update={"label_smoothing": 0.0})  # it smooths within each level

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """(batch, classes) logits and targets -> a scalar, fp32."""
        if self._semantic is not None:
            return self._semantic(logits, targets)
        return F.cross_entropy(logits.float(), targets)


def diagonality_weight(section: LossSection, *, epoch: float) -> float:
    """Weight of the diagonality loss after ``epoch`` passes over the data: linear within the ramp, then constant."""
    ramp = section.diagonality_ramp_epochs
    return section.diagonality_weight * (min(1.0, epoch / ramp) if ramp else 1.0)
