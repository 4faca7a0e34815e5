"""Everything random or computed that the DALI graph needs to know about each image, drawn on the host.

All numbers of an image come from a generator keyed on (seed; sample, epoch, block): each augmentation owns its
blocks of four words, so that switching one on changes no other, and the pixels do not depend on ranks, batches,
threads or restarts.
"""

import numpy as np
from numpy.typing import NDArray

from data_pipeline.auto_augment import draw_rand_augment, draw_trivial_augment
from data_pipeline.philox import philox, uniform
from data_pipeline.transforms import (
    AffineConfig,
    ColorJitterConfig,
    InputConfig,
    RandomErasingConfig,
    RandomResizedCropConfig,
)

Params = dict[str, NDArray]
_CROP, _FLIP, _AFFINE, _POLICY, _JITTER, _ERASE = 0, 16, 17, 18, 32, 33
_TRIES = 10


class Draws:
    """Uniform numbers for a batch of n images."""

    def __init__(self, seed: int, epochs: NDArray[np.int64], ids: NDArray[np.int64]) -> None:
        self._seed, self._epochs, self._ids = seed, epochs, ids

    def uniform(self, block: int, count: int) -> NDArray[np.float64]:
        """Return (n, count) numbers in [0, 1), from as many blocks as that takes, beginning with `block`."""
        blocks = np.arange(block, block + -(-count // 4))
        ids, epochs = self._ids[:, None], self._epochs[:, None]
        words = philox(self._seed, ids, ids >> 32, epochs, blocks[None, :])
        return uniform(words.reshape(len(ids), -1)[:, :count])


def train_params(config: InputConfig, draws: Draws, widths: NDArray[np.int64], heights: NDArray[np.int64]) -> Params:
    """Return the graph's inputs for training; widths and heights are (n,) pixels of the stored images."""
    augment = config.augment
    if augment.random_resized_crop is None:
        params = _whole(widths, heights)
    else:
        params = random_resized_crop(augment.random_resized_crop, draws, widths, heights)
    params["mirror"] = (draws.uniform(_FLIP, 1)[:, 0] < augment.horizontal_flip).astype(np.int32)
    if augment.affine is not None:
        params["affine"] = affine(augment.affine, draws, config.size)
    if augment.color_jitter is not None:
        params |= color_jitter(augment.color_jitter, draws)
    if augment.rand_augment is not None:
        params |= draw_rand_augment(augment.rand_augment, draws.uniform(_POLICY, 5 * augment.rand_augment.operations))
    if augment.trivial_augment:
        params |= draw_trivial_augment(draws.uniform(_POLICY, 3))
    if augment.random_erasing is not None:
        params |= random_erasing(augment.random_erasing, draws, config.size)
    return params


def _whole(widths: NDArray[np.int64], heights: NDArray[np.int64]) -> Params:
    shape = np.stack([heights, widths], axis=1).astype(np.int32)
    return {"start": np.zeros_like(shape), "shape": shape}


def random_resized_crop(
    config: RandomResizedCropConfig, draws: Draws, widths: NDArray[np.int64], heights: NDArray[np.int64]
) -> Params:
    """Draw boxes by torchvision's rule: the first of ten tries that fits, else a centered box as large as can be.

    Returns:
        start and shape, each (n, 2) int32: top and left, height and width.
    """
    u = draws.uniform(_CROP, 2 * _TRIES + 2)
    w, h = _tries(config, u, (widths * heights)[:, None])
    fits = (w >= 1) & (w <= widths[:, None]) & (h >= 1) & (h <= heights[:, None])
    first = fits.argmax(axis=1)[:, None]
    some = fits.any(axis=1)
    # No try fits: the whole image, cut to the nearest allowed ratio, centered.
    ratios = widths / heights
    whole_w = np.where(ratios > config.ratio[1], np.rint(heights * config.ratio[1]), widths)
    whole_h = np.where(ratios < config.ratio[0], np.rint(widths / config.ratio[0]), heights)
    width = np.where(some, np.take_along_axis(w, first, 1)[:, 0], np.maximum(whole_w, 1))
    height = np.where(some, np.take_along_axis(h, first, 1)[:, 0], np.maximum(whole_h, 1))
    top = np.where(some, np.floor(u[:, -2] * (heights - height + 1)), (heights - height) // 2)
    left = np.where(some, np.floor(u[:, -1] * (widths - width + 1)), (widths - width) // 2)
    return {
        "start": np.stack([top, left], axis=1).astype(np.int32),
        "shape": np.stack([height, width], axis=1).astype(np.int32),
    }


def _tries(
    config: RandomResizedCropConfig | RandomErasingConfig, u: NDArray[np.float64], area: NDArray[np.int64] | int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the sides of ten boxes, each (n, 10), whose area and ratio (first over second side) are drawn."""
    areas = area * (config.scale[0] + u[:, :_TRIES] * (config.scale[1] - config.scale[0]))
    low, high = np.log(config.ratio)
    ratios = np.exp(low + u[:, _TRIES : 2 * _TRIES] * (high - low))
    return np.rint(np.sqrt(areas * ratios)), np.rint(np.sqrt(areas / ratios))


def affine(config: AffineConfig, draws: Draws, size: tuple[int, int]) -> NDArray[np.float32]:
    """Return (n, 2, 3) matrices that map a pixel (x, y) of the result to where it comes from."""
    u = draws.uniform(_AFFINE, 4)
    angle = np.deg2rad(config.degrees) * (2 * u[:, 0] - 1)
    shift = config.translate * (2 * u[:, 1:3] - 1) * np.array([size[1], size[0]])
    zoom = config.scale[0] + u[:, 3] * (config.scale[1] - config.scale[0])
    cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
    linear = np.stack([np.stack([cos, sin], -1), np.stack([-sin, cos], -1)], axis=1)
    center = np.array([size[1], size[0]]) / 2  # DALI's coordinates: a pixel's center is at +0.5
    offset = center - np.einsum("nij,nj->ni", linear, center + shift)
    return np.concatenate([linear, offset[:, :, None]], axis=2).astype(np.float32)


def color_jitter(config: ColorJitterConfig, draws: Draws) -> Params:
    """Return factors around 1 for brightness, contrast and saturation, and degrees for hue, each (n,) float32."""
    u = 2 * draws.uniform(_JITTER, 4) - 1
    values = {
        "brightness": 1 + config.brightness * u[:, 0],
        "contrast": 1 + config.contrast * u[:, 1],
        "saturation": 1 + config.saturation * u[:, 2],
        "hue": 360 * config.hue * u[:, 3],
    }
    return {name: value.astype(np.float32) for name, value in values.items()}


def random_erasing(config: RandomErasingConfig, draws: Draws, size: tuple[int, int]) -> Params:
    """Draw boxes by timm's rule: the first of ten tries that is smaller than the image.

    Returns:
        erase_start and erase_shape, each (n, 2) float32: top and left, height and width, which are 0 to erase nothing.
    """
    u = draws.uniform(_ERASE, 2 * _TRIES + 3)
    h, w = _tries(config, u, size[0] * size[1])
    fits = (h < size[0]) & (w < size[1])
    first = fits.argmax(axis=1)[:, None]
    erased = fits.any(axis=1) & (u[:, -1] < config.probability)
    height = np.where(erased, np.take_along_axis(h, first, 1)[:, 0], 0)
    width = np.where(erased, np.take_along_axis(w, first, 1)[:, 0], 0)
    top, left = np.floor(u[:, -3] * (size[0] - height + 1)), np.floor(u[:, -2] * (size[1] - width + 1))
    return {
        "erase_start": np.stack([top, left], axis=1).astype(np.float32),
        "erase_shape": np.stack([height, width], axis=1).astype(np.float32),
    }


def eval_params(config: InputConfig, widths: NDArray[np.int64], heights: NDArray[np.int64]) -> Params:
    """Return the graph's inputs for evaluation: torchvision's Resize and CenterCrop, with their rounding.

    The image is resized so that it covers image size / eval_crop_ratio, then its center is cut out.
    """
    target = np.floor(np.array(config.size) / config.eval_crop_ratio + 1e-6)
    scale = np.maximum(target[0] / heights, target[1] / widths)
    # The side that decides gets exactly its target; the other is rounded down, as torchvision does.
    size = np.stack([np.floor(heights * scale + 1e-6), np.floor(widths * scale + 1e-6)], axis=1)
    size = np.maximum(size, target)
    room = size - np.array(config.size)
    start = np.rint(room / 2)
    position = np.divide(start, room, out=np.zeros_like(start), where=room > 0)
    return _whole(widths, heights) | {
        "resize": size.astype(np.float32),
        "crop_y": position[:, 0].astype(np.float32),
        "crop_x": position[:, 1].astype(np.float32),
    }
