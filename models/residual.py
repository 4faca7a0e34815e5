"""The attention residual: the last scores of a stage, pooled, start the scores of the next."""

import math

import torch
from torch import Tensor, nn

from .config import Grid

INITIAL_SCALE = 1e-2
"""LayerScale's start (this project's choice): near the network without the residual, yet above the relative rounding of
bfloat16 (2^-8), below which the sum with the scores would lose it and learn from noise."""


class AttentionResidual(nn.Module):
    """`LayerScale(Conv1x1(DWConv(A_{m-1})))`, pooled on the token grids.

    The scores are seen as (heads, h', w', h, w), and the depthwise convolution's kernel and stride are the ratio of the
    two stages' grids on each of the four axes: 2 over queries, `key_ratio` over keys (this project's choice; the paper
    strides over the flattened matrix, whose neighbors are not neighbors in the image). It starts as the average.
    Neither convolution has a bias: it would add one number to all scores, which the softmax does not see.

    All three are linear, and the depthwise kernels do not overlap, so they are applied as one small matrix to the
    patches: a depthwise convolution of so few channels took up to three times as long on a CPU.
    """

    def __init__(self, heads_before: int, heads: int, key_ratio: int) -> None:
        super().__init__()
        self.key_ratio = key_ratio
        offsets = (key_ratio, key_ratio, 2, 2)
        self.pool = nn.Parameter(torch.full((heads_before, *offsets), 1 / math.prod(offsets)))
        """DWConv: for each head, offsets over the key grid's rows and columns, then over the query grid's."""
        self.mix = nn.Parameter(torch.full((heads, heads_before), 1 / heads_before))
        """Conv1x1."""
        self.gamma = nn.Parameter(torch.full((heads,), INITIAL_SCALE))
        """LayerScale, one number per head."""

    def forward(self, scores: Tensor, grid: Grid, key_grid: Grid) -> Tensor:
        """Pool the scores of the stage before.

        Args:
            scores: (batch, heads before, M, N), pre-softmax.
            grid: query grid of the stage before, N = height x width.
            key_grid: key grid of the stage before, M = height x width.

        Returns:
            (batch, heads, M / key_ratio^2, N / 4).
        """
        batch, heads = scores.shape[:2]
        ratio, (rows, columns) = self.key_ratio, (key_grid[0] // self.key_ratio, key_grid[1] // self.key_ratio)
        split = scores.view(batch, heads, rows, ratio, columns, ratio, grid[0] // 2, 2, grid[1] // 2, 2)
        patches = split.permute(0, 1, 3, 5, 7, 9, 2, 4, 6, 8).reshape(batch, heads * ratio**2 * 4, -1)
        mixed = (self.gamma[:, None] * self.mix)[:, :, None] * self.pool.flatten(1)
        pooled = mixed.flatten(1).to(scores.dtype).expand(batch, -1, -1) @ patches
        return pooled.view(batch, -1, rows * columns, grid[0] * grid[1] // 4)
