"""Learning-rate schedule and the keyed draws of drop path."""

import math

import numpy as np
import torch

from pretrain.recipe import ScheduleSection


def count_steps(schedule: ScheduleSection, *, epoch_size: int, global_batch: int) -> int:
    """Optimizer steps of a run: whole global batches that fit into its epochs, at least one."""
    return max(1, int(schedule.epochs * epoch_size) // global_batch)


def learning_rate(samples: int, *, peak: float, schedule: ScheduleSection, epoch_size: int) -> float:
    """Linear warm-up, then half a cosine down to ``min_lr`` (Loshchilov and Hutter 2017), by samples seen.

    Args:
        samples: pictures that will have been trained on after this step; counting them instead of steps keeps the
            schedule the same under another global batch.
        peak: learning rate at the end of the warm-up.
        schedule: lengths in epochs.
        epoch_size: pictures in an epoch.
    """
    warmup = schedule.warmup_epochs * epoch_size
    total = schedule.epochs * epoch_size
    if samples < warmup:
        return peak * samples / warmup
    done = min(1.0, (samples - warmup) / max(1.0, total - warmup))
    return schedule.min_lr + (peak - schedule.min_lr) * 0.5 * (1.0 + math.cos(math.pi * done))


def drop_path_uniforms(seed: int, step: int, rows: np.ndarray, *, branches: int, global_batch: int) -> torch.Tensor:
    """Uniforms in [0, 1) that decide which residual branches a picture skips: (branches, len(rows)), fp32.

    They are a pure function of (seed, step, row of the global batch), drawn for the whole batch by Philox (Salmon et
    al. 2011) and then indexed, so they do not depend on how the batch is split over ranks and micro-batches.
    """
    generator = np.random.Generator(
        np.random.Philox(
            key=np.array([seed, 0x64726F70], dtype=np.uint64), counter=np.array([0, 0, 0, step], dtype=np.uint64)
        )
    )
    draws = generator.random((global_batch, branches), dtype=np.float32)
    return torch.from_numpy(np.ascontiguousarray(draws[rows].T))
