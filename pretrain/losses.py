"""The loss that training minimizes."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from data_pipeline.batch import Batch, to_device
from data_pipeline.mixing import mix
from data_pipeline.transforms import MixingConfig
from models import SemanticSoftmax
from pretrain.class_tree import read_ancestors
from pretrain.engine.schedule import draw_step
from pretrain.factory import call_network, seed_generators
from pretrain.recipe import LossSection, Recipe
from pretrain.state import TrainState


class Classification:
    """The loss of the logits against soft targets; ``class_ids`` are the dataset's, in the order of its labels."""

    def __init__(
        self, section: LossSection, mixing: MixingConfig, class_ids: Sequence[str], device: torch.device
    ) -> None:
        self.name = section.classification
        """Its name among the metrics."""
        self.mixing = mixing
        """How targets are to be made for it."""
        self.num_classes = len(class_ids)
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


class TrainingLoss:
    """Forward pass and loss of a micro-batch: classification, for a LaViT plus the weighted diagonality loss.

    ``dtype`` is that in which the network takes its images, ``epoch_size`` the number of images in the training split.
    """

    def __init__(
        self,
        recipe: Recipe,
        engine: Any,
        classification: Classification,
        *,
        device: torch.device,
        dtype: torch.dtype,
        epoch_size: int,
    ) -> None:
        self.classification = classification
        self._recipe, self._engine = recipe, engine
        self._device, self._dtype, self._epoch_size = device, dtype, epoch_size

    def __call__(self, batch: Batch, state: TrainState) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The scalar to minimize of ``batch`` at ``state``, and its unweighted parts by name."""
        _, targets, logits, diagonality = self.predict(batch, state)
        loss = classification = self.classification(logits, targets)
        parts: dict[str, torch.Tensor] = {self.classification.name: classification}
        if diagonality is not None:
            weight = diagonality_weight(self._recipe.loss, epoch=state.samples_seen / self._epoch_size)
            loss, parts = classification + weight * diagonality.float(), parts | {"diagonality": diagonality}
        return loss, parts

    def predict(
        self, batch: Batch, state: TrainState
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Mix ``batch`` of m images and run the network on it, at ``state``.

        Returns:
            mixed images (m, 3, H, W), targets and logits (m, classes), and a LaViT's diagonality loss, a scalar.
        """
        recipe, model = self._recipe, self._engine.module
        drawn = batch.drawn or draw_step(recipe, model, state.step, batch.rows)
        uniforms = None if drawn.drop_path is None else to_device(drawn.drop_path, self._device)
        images, targets = mix(
            batch.images,
            batch.labels,
            batch.rows,
            config=self.classification.mixing,
            num_classes=self.classification.num_classes,
            seed=recipe.seed,
            step=state.step,
            drawn=drawn.mixing,
        )
        images = images.to(self._dtype)
        seed_generators(recipe.seed, state.step, int(batch.rows[0]))
        form = "as_printed" if recipe.loss.diagonality_form == "as_printed" else True
        return images, targets, *call_network(model, self._engine, images, uniforms, form)
