"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) on a batch on its device, with soft targets.

Row 2i of the global batch is mixed with row 2i + 1 and the other way round, with one draw for both, so that partners
always share a rank and a micro-batch. The draws are keyed on (seed, step, pair): a batch is mixed in the same way on
any number of ranks and after any restart. They need no image, so a thread can make them ahead.
Erasing and flipping are done before, by DALI.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.batch import to_device
from data_pipeline.errors import DataError
from data_pipeline.philox import philox, uniform
from data_pipeline.transforms import MixingConfig

_STREAM = 1 << 31  # apart from the order's streams and the augmentation's blocks


@dataclass(frozen=True)
class MixingDraw:
    """How the m rows of a micro-batch are mixed, each with its partner."""

    keep: NDArray[np.float32]
    """(m,) share of itself that a row keeps."""
    boxes: NDArray[np.int64]
    """(m, 4) box that a row takes from its partner, in pixels: top, bottom, left, right; empty to blend the two."""


def draw_mixing(
    config: MixingConfig, *, seed: int, step: int, rows: NDArray[np.int64], size: tuple[int, int]
) -> MixingDraw | None:
    """Draw how a micro-batch is mixed; None where mixing is off.

    Args:
        config: how to mix.
        seed: the run's seed.
        step: optimizer step, from 0, that the global batch belongs to.
        rows: (m,) rows of the global batch, as in `Batch.rows`.
        size: height and width of the images.

    Raises:
        DataError: the rows are not complete pairs (2i, 2i + 1).
    """
    if not config.in_pairs:
        return None
    if len(rows) % 2 or rows[0] % 2 or (np.diff(rows) != 1).any():
        raise DataError(
            f"mixup and CutMix need complete pairs of rows, but a micro-batch has {len(rows)} rows from row {rows[0]}; "
            "choose an even micro-batch"
        )
    from scipy.special import betaincinv  # type: ignore[import-untyped]  # noqa: PLC0415 - slow to import

    pairs = rows[::2] // 2
    u = uniform(philox(seed, pairs, step, step >> 32, _STREAM))
    cut = u[:, 0] < (config.switch_probability if config.mixup and config.cutmix else float(config.cutmix > 0))
    # Half a step of the generator from 0 and 1, where the inverse of a Beta distribution is degenerate.
    middle = u[:, 1] + 2.0**-33
    keep = np.empty(len(pairs))
    for chosen, alpha in ((cut, config.cutmix), (~cut, config.mixup)):
        if chosen.any():
            keep[chosen] = betaincinv(alpha, alpha, middle[chosen])
    boxes = np.zeros((len(pairs), 4), np.int64)
    side = np.sqrt(1 - keep)
    for axis, length in enumerate(size):
        center, half = np.floor(u[:, 2 + axis] * length), np.floor(side * length) // 2
        boxes[:, 2 * axis] = np.where(cut, np.clip(center - half, 0, length), 0)
        boxes[:, 2 * axis + 1] = np.where(cut, np.clip(center + half, 0, length), 0)
    # A box that the border has cut off is smaller than drawn: the label follows the pixels.
    area = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2])
    share = np.where(cut, 1 - area / (size[0] * size[1]), keep).astype(np.float32)
    return MixingDraw(share.repeat(2), boxes.repeat(2, axis=0))


def soft_targets(labels: torch.Tensor, num_classes: int, smoothing: float) -> torch.Tensor:
    """Return (m, num_classes) float32 targets: s / num_classes for every class, and 1 - s more for the label."""
    targets = torch.full((len(labels), num_classes), smoothing / num_classes, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1 - smoothing + smoothing / num_classes)


def mix(
    images: torch.Tensor,
    labels: torch.Tensor,
    rows: NDArray[np.int64],
    *,
    config: MixingConfig,
    num_classes: int,
    seed: int,
    step: int,
    drawn: MixingDraw | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix a micro-batch.

    Args:
        images: (m, 3, H, W) on any device; left as they are.
        labels: (m,) int64 on the same device.
        rows: (m,) rows of the global batch; these and config, seed and step as for `draw_mixing`.
        config: how to mix.
        num_classes: width of the targets.
        seed: the run's seed.
        step: optimizer step.
        drawn: what `draw_mixing` returns for these arguments, if it was called before.

    Returns:
        Mixed images of the same shape and type, and (m, num_classes) float32 targets.
    """
    targets = soft_targets(labels, num_classes, config.label_smoothing)
    height, width = images.shape[-2:]
    drawn = drawn or draw_mixing(config, seed=seed, step=step, rows=rows, size=(height, width))
    if drawn is None:
        return images, targets
    partner = torch.arange(len(rows), device=images.device) ^ 1
    top, bottom, left, right = to_device(drawn.boxes, images.device).T[:, :, None, None, None]
    y = torch.arange(height, device=images.device).view(1, 1, -1, 1)
    x = torch.arange(width, device=images.device).view(1, 1, 1, -1)
    inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)
    share = to_device(drawn.keep, images.device)
    # A pair either has a box or is blended; without a box, `blend` is the share that an image keeps.
    blend = torch.where(bottom > top, 1.0, share.view(-1, 1, 1, 1)).to(images.dtype)
    other = images[partner]
    mixed = torch.where(inside, other, blend * images + (1 - blend) * other)
    return mixed, share[:, None] * targets + (1 - share[:, None]) * targets[partner]
