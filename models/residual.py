"""The attention residual: the last scores of a stage, pooled, start the scores of the next."""

import torch
from torch import Tensor, nn

from models.config import Grid


class LayerScale(nn.Module):
    """One learnable scale per head.

    It starts at 0.01 (this project's choice): near the network without the residual, yet above the relative rounding
    of bfloat16 (2^-8), below which the sum with the scores would lose it and learn from noise.
    """

    INITIAL = 1e-2

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((heads,), self.INITIAL))

    def forward(self, scores: Tensor) -> Tensor:
        """Scores (batch, heads, ...) to the same shape."""
        return scores * self.gamma.to(scores.dtype).view(1, -1, *[1] * (scores.ndim - 2))


class AttentionResidual(nn.Module):
    """`LayerScale(Conv1x1(DWConv(A_{m-1})))`, pooled on the token grids.

    The scores are seen as (heads, h', w', h, w), and the depthwise convolution's kernel and stride are the ratio of the
    two stages' grids on each of the four axes: 2 over queries, `key_ratio` over keys (this project's choice; the paper
    strides over the flattened matrix, whose neighbours are not neighbours in the picture). It starts as the average.
    Neither convolution has a bias: it would add one number to all scores, which the softmax does not see.
    """

    def __init__(self, heads_before: int, heads: int, key_ratio: int) -> None:
        super().__init__()
        self.key_ratio = key_ratio
        offsets = key_ratio**2
        self.pool = nn.Conv2d(heads_before * offsets, heads_before, 2, stride=2, groups=heads_before, bias=False)
        self.mix = nn.Conv2d(heads_before, heads, 1, bias=False)
        self.scale = LayerScale(heads)

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
        # Keys that pool together become input channels of their head, and the rest of the key axis is stacked on top
        # of the query grid's rows: as these are even, no 2 x 2 square of queries straddles two keys. Where the key
        # grids are equal nothing moves, and it all is a view.
        split = scores.view(batch, heads, rows, ratio, columns, ratio, *grid)
        picture = split.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(batch, heads * ratio**2, -1, grid[1])
        return self.scale(self.mix(self.pool(picture)).view(batch, -1, rows * columns, grid[0] * grid[1] // 4))
