"""Synthetic images: textured shapes on a textured background, with masks.

Color, brightness and place are independent of a shape's class, so a network has to see form. Each image is a function
of (seed, size); shapes do not overlap.
"""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CLASSES = ("disc", "square", "triangle", "cross")
"""A mask counts them from 1; 0 is the background."""
SIZES = (11.0, 20.0)
"""Smallest and largest radius of the circle around a shape, in pixels; on small images less."""
MOST_SHAPES = 3
EVALUATED = 10**9
"""Seeds of evaluated images start here, those of training images at 0: none is in both."""
_TRIES = 20


def draw(seed: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Draw the image of a seed, with 1 to MOST_SHAPES shapes, fewer where there is no room.

    Args:
        seed: each number is another image.
        size: height and width in pixels, at least 20.

    Returns:
        the image, (3, height, width) in 0..1; and its mask, (height, width) int64.
    """
    source = np.random.default_rng(seed)
    height, width = size
    mask = np.zeros(size, np.int64)
    color = source.uniform(0.2, 0.8, (3, 1, 1))
    image = color + _patches(source, size)
    drawn, taken = 0, np.zeros(size, bool)
    rows, columns = np.mgrid[:height, :width] + 0.5
    wanted = source.integers(1, MOST_SHAPES + 1)
    for _ in range(_TRIES):
        if drawn == wanted:
            break
        radius = source.uniform(SIZES[0], min(SIZES[1], 0.45 * min(size)))
        row, column = (source.uniform(radius, side - radius) for side in size)
        near = (rows - row) ** 2 + (columns - column) ** 2 < (radius + 2) ** 2
        if (near & taken).any():
            continue
        label = int(source.integers(len(CLASSES)))
        inside = _inside(label, (columns - column) / radius, (rows - row) / radius, source.uniform(-0.3, 0.3))
        if not inside.any():
            continue
        taken |= near
        image = np.where(inside, _another_color(source, color) + _patches(source, size), image)
        mask[inside] = label + 1
        drawn += 1
    noisy = image + source.normal(0, 0.04, image.shape)
    return torch.from_numpy(noisy.clip(0, 1).astype(np.float32)), torch.from_numpy(mask)


def draw_many(seeds: Iterable[int], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Images (seeds, 3, height, width) and masks (seeds, height, width)."""
    images, masks = zip(*(draw(seed, size) for seed in seeds), strict=True)
    return torch.stack(images), torch.stack(masks)


def _patches(source: np.random.Generator, size: tuple[int, int]) -> NDArray[np.float64]:
    """(3, *size): patches of noise of a random coarseness about 0."""
    cell = int(source.integers(2, 9))
    coarse = source.normal(0, 0.05, (3, -(-size[0] // cell), -(-size[1] // cell)))
    return coarse.repeat(cell, 1).repeat(cell, 2)[:, : size[0], : size[1]]


def _another_color(source: np.random.Generator, color: NDArray[np.float64]) -> NDArray[np.float64]:
    """A random color at least 0.3 away from another one, so that the shape is visible."""
    while True:
        other = source.uniform(0.1, 0.9, (3, 1, 1))
        if np.linalg.norm(other - color) > 0.3:
            return other


def _inside(label: int, x: NDArray[np.float64], y: NDArray[np.float64], angle: float) -> NDArray[np.bool_]:
    """Where a shape is, turned by `angle`; its circle has radius 1."""
    x, y = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    match CLASSES[label]:
        case "disc":
            return x**2 + y**2 < 0.85**2
        case "square":
            return np.maximum(abs(x), abs(y)) < np.sqrt(0.5)
        case "triangle":
            return (y < 0.5) & (y > -1 + np.sqrt(3) * abs(x))
        case _:
            return (np.minimum(abs(x), abs(y)) < 0.28) & (np.maximum(abs(x), abs(y)) < 0.95)
