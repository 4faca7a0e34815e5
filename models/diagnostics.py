"""What the paper argues with: how diagonal, symmetric and saturated each block's attention is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import LessAttention, Observer
from .config import Grid
from .diagonality import pool_queries
from .lavit import LaViT


@dataclass(frozen=True)
class BlockDiagnostics:
    """One block's attention, averaged over heads and images; the queries are pooled to the key grid first."""

    stage: int
    """Counted from 0, as in parameter names."""
    block: int
    """Counted from 0 within the stage."""
    kind: Literal["vanilla", "less"]
    diagonality: float
    """`trace(A) / M`: the share of attention that a token pays to its own place; 1 / M where it pays alike to all."""
    symmetry: float
    """`1 - sum_ij |A_ij - A_ji| / 2M`: 1 for a symmetric matrix, 0 where no attention is returned."""
    saturation: float | None
    """Cosine similarity of attention rows with the block before, in the same stage; 1: the block looks where its
    predecessor did. None for the first block of a stage."""


Look = Callable[[int, int, Tensor, Grid, Grid], None]
"""Is given stage, block, attention (batch, heads, M, N) with keys on M, query grid (N) and key grid (M)."""


def attention_diagnostics(model: LaViT, images: Tensor, look: Look | None = None) -> list[BlockDiagnostics]:
    """Measure every block's attention in one extra forward pass, without gradients and in evaluation mode.

    Meant for a few images every few hundred steps: each block computes the matrix here that
    scaled_dot_product_attention does not return. Nothing is left behind that would slow training down. The result is
    read from the device once.

    Args:
        model: any LaViT, on any device, under any ZeRO stage (all ranks must call it then).
        images: as for `LaViT.forward`.
        look: is shown every block's attention, in the order of depth.

    Returns:
        One entry a block, in the order of depth.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), _observed(model, look) as rows:
            model.forward_features(images)
    finally:
        model.train(training)
    numbers = torch.stack([torch.stack(row[3:]) for row in rows]).tolist()
    return [
        BlockDiagnostics(stage, block, kind, diagonality, symmetry, saturation if block else None)
        for (stage, block, kind, *_), (diagonality, symmetry, saturation) in zip(rows, numbers, strict=True)
    ]


Row = tuple[int, int, Literal["vanilla", "less"], Tensor, Tensor, Tensor]


@contextmanager
def _observed(model: LaViT, look: Look | None) -> Iterator[list[Row]]:
    """Let every attention module report to a list, and stop afterwards."""
    rows: list[Row] = []
    previous: list[Tensor] = []

    def observer(stage: int, block: int, kind: Literal["vanilla", "less"]) -> Observer:
        def observe(attention: Tensor, grid: Grid, key_grid: Grid) -> None:
            square = pool_queries(attention.float(), grid, key_grid)
            keys = square.shape[-1]
            diagonality = square.diagonal(dim1=-2, dim2=-1).sum(-1).mean() / keys
            asymmetry = (square - square.transpose(-2, -1)).abs().sum((-2, -1)).mean()
            similar = F.cosine_similarity(square, previous[0], dim=-2).mean() if block else torch.zeros_like(asymmetry)
            previous[:] = [square]
            if look is not None:
                look(stage, block, attention, grid, key_grid)
            rows.append((stage, block, kind, diagonality, 1 - asymmetry / (2 * keys), similar))

        return observe

    modules = []
    try:
        for index, stage in enumerate(model.stages):
            for depth, block in enumerate(stage.blocks):
                kind: Literal["vanilla", "less"] = "less" if isinstance(block.attention, LessAttention) else "vanilla"
                block.attention.observer = observer(index, depth, kind)
                modules.append(block.attention)
        yield rows
    finally:
        for module in modules:
            del module.observer  # back to the class's None: a compiled graph is not to see that there ever was one
