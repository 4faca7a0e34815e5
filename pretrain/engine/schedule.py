"""Learning-rate schedule, and what is drawn for a step: mixing and drop path."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data_pipeline.mixing import MixingDraw, draw_mixing
from pretrain.engine.optimizers import peak_learning_rate
from pretrain.factory import drawn_branches
from pretrain.recipe import Recipe, ScheduleSection
from pretrain.state import TrainState


def learning_rate(samples: int, *, peak: float, schedule: ScheduleSection, epoch_size: int) -> float:
    """Linear warm-up, then half a cosine down to ``min_lr`` (Loshchilov and Hutter 2017), by samples seen.

    Args:
        samples: images that will have been trained on after this step; counting them instead of steps keeps the
            schedule the same under another global batch.
        peak: learning rate at the end of the warm-up.
        schedule: lengths in epochs.
        epoch_size: images in an epoch.
    """
    warmup = schedule.warmup_epochs * epoch_size
    total = schedule.epochs * epoch_size
    if samples < warmup:
        return peak * samples / warmup
    done = min(1.0, (samples - warmup) / max(1.0, total - warmup))
    return schedule.min_lr + (peak - schedule.min_lr) * 0.5 * (1.0 + math.cos(math.pi * done))


def drop_path_uniforms(seed: int, step: int, rows: np.ndarray, *, branches: int) -> torch.Tensor:
    """Uniforms in [0, 1) that decide which residual branches an image skips: (branches, len(rows)), fp32.

    They are a pure function of (seed, step, row of the global batch), by numpy's Philox4x64 (Salmon et al. 2011): row r
    has the numbers r * branches and following of a step's stream. Only the rows' part of it is generated, so the cost
    does not depend on the global batch.
    """
    first, last = int(rows.min()), int(rows.max())
    block, skipped = divmod(first * branches, 8)  # a counter gives eight numbers of 32 bits
    generator = np.random.Generator(
        np.random.Philox(
            key=np.array([seed, 0x64726F70], dtype=np.uint64), counter=np.array([block, 0, 0, step], dtype=np.uint64)
        )
    )
    numbers = generator.random((last + 1) * branches - 8 * block, dtype=np.float32)[skipped:]
    return torch.from_numpy(np.ascontiguousarray(numbers.reshape(-1, branches)[rows - first].T))


@dataclass(frozen=True)
class StepDraw:
    """What is drawn for a micro-batch of m images."""

    mixing: MixingDraw | None
    drop_path: torch.Tensor | None
    """(branches, m), as `drop_path_uniforms` returns it."""


def draw_step(recipe: Recipe, model: Any, step: int, rows: np.ndarray) -> StepDraw:
    """Draw mixing and drop path; a function of recipe, network, step (from 0) and rows (m,) of the global batch only.

    Only a LaViT's residual branches are drawn here; another network draws its random numbers itself.
    """
    branches = drawn_branches(model)
    uniforms = drop_path_uniforms(recipe.seed, step, rows, branches=branches) if branches else None
    mixing = draw_mixing(recipe.mixing, seed=recipe.seed, step=step, rows=rows, size=recipe.data.size)
    return StepDraw(mixing, uniforms)


@dataclass(frozen=True)
class Schedule:
    """When what happens in a run, as functions of its position in samples seen."""

    recipe: Recipe
    epoch_size: int
    """Images in the training split."""
    global_batch: int

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run: whole global batches that fit into its epochs, at least one."""
        return max(1, int(self.recipe.schedule.epochs * self.epoch_size) // self.global_batch)

    @property
    def log_every(self) -> int:
        """Steps between lines of metrics: ``log_every_steps``, or what follows from the length of the run."""
        return self.recipe.log_every_steps or min(max(self.total_steps // 100, 1), 50)

    @property
    def checkpoint_every(self) -> int:
        """Steps between checkpoints: ``checkpoint.every_steps``, or what follows from the length of the run."""
        return self.recipe.checkpoint.every_steps or min(max(self.total_steps // 10, 10), 1000)

    def learning_rate(self, samples_seen: int) -> float:
        """Of the step that begins at so many samples seen."""
        return learning_rate(
            samples_seen + self.global_batch,
            peak=peak_learning_rate(self.recipe.optimizer, self.global_batch)[0],
            schedule=self.recipe.schedule,
            epoch_size=self.epoch_size,
        )

    def passed(self, every_epochs: float, last: int, state: TrainState) -> bool:
        """Whether a multiple of ``every_epochs``, or the end, is between ``last`` (samples seen) and ``state``."""
        interval, seen = every_epochs * self.epoch_size, state.samples_seen
        return seen // interval > last // interval or (state.step >= self.total_steps and last < seen)
