"""Psi, Theta and position embeddings on another grid of tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import Grid


def _interpolate(fields: Tensor, grid: Grid) -> Tensor:
    """(K, h, w) to (K, *grid), bicubic, low-pass filtered where it shrinks; in fp32, which the kernels support."""
    dtype = fields.dtype if fields.dtype == torch.float64 else torch.float32
    return F.interpolate(fields[None].to(dtype), grid, mode="bicubic", align_corners=False, antialias=True)[0]


def resample_table(table: Tensor, source: Grid, target: Grid) -> Tensor:
    """A value per token, seen as an image over the grid and resized by bicubic interpolation.

    Args:
        table: (T, C), T = source height x width.
        source: the table's grid.
        target: the wanted grid.

    Returns:
        (T', C), T' = target height x width.
    """
    image = table.T.unflatten(1, source)
    return _interpolate(image, target).flatten(1).T.to(table.dtype)


def resample_map(weight: Tensor, source: Grid, target: Grid) -> Tensor:
    """A Linear layer over tokens, seen as a map from grid to grid, for another grid (this project's choice).

    With `W = I + D`, the identity stays what it is and D is interpolated over the grid it reads and over the grid it
    writes. It is multiplied by T / T', as each output now sums over T' tokens in place of T: a smooth
    image of scores, enlarged and mapped, equals the mapped one, enlarged.

    Args:
        weight: (T, T), outputs by inputs, T = source height x width.
        source: the weight's grid.
        target: the wanted grid.

    Returns:
        (T', T'), T' = target height x width.
    """
    before, after = source[0] * source[1], target[0] * target[1]
    change = weight - torch.eye(before, device=weight.device, dtype=weight.dtype)
    reads = _interpolate(change.unflatten(1, source), target).flatten(1) * (before / after)
    writes = _interpolate(reads.T.unflatten(1, source), target).flatten(1).T
    return (writes + torch.eye(after, device=weight.device, dtype=writes.dtype)).to(weight.dtype)
