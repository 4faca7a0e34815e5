"""One pre-norm transformer block: attention of either kind and an MLP, each on a residual branch."""

import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention, layer_norm
from .config import Grid
from .diagonality import Diagonality


def drop_path(branch: Tensor, uniforms: Tensor, rate: float) -> Tensor:
    """Stochastic depth (Huang et al., 2016): keep sample b where `uniforms[b] >= rate`, scaled by 1 / (1 - rate).

    Args:
        branch: (batch, N, C).
        uniforms: (batch,) in [0, 1).
        rate: the share of samples that lose the branch, in [0, 1).
    """
    if rate == 0:
        return branch
    keep = (uniforms >= rate).to(branch.dtype) / (1 - rate)
    return branch * keep[:, None, None]


class Mlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, N, C) to the same shape."""
        return self.fc2(F.gelu(self.fc1(tokens)))


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`, with stochastic depth on both branches."""

    def __init__(self, width: int, attention: Attention, mlp_ratio: float, drop_rate: float) -> None:
        super().__init__()
        self.drop_rate = drop_rate
        self.norm1 = layer_norm(width)
        self.attention = attention
        self.norm2 = layer_norm(width)
        self.mlp = Mlp(width, round(width * mlp_ratio))

    def forward(
        self,
        tokens: Tensor,
        grid: Grid,
        scores: Tensor | None,
        uniforms: Tensor | None,
        with_diagonality: Diagonality,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Run the block.

        Nothing random is drawn in here, so a recomputation under activation checkpointing repeats it exactly.

        Args:
            tokens: (batch, N, C).
            grid: query grid, N = height x width.
            scores: what comes before, (batch, heads, M, N): the previous block's scores for Less Attention, the
                attention residual or None for Vanilla Attention.
            uniforms: (2, batch), for stochastic depth on the two branches; None: both are kept.
            with_diagonality: whether to compute the diagonality loss.

        Returns:
            Tokens (batch, N, C); the scores for the next block, or None; the diagonality loss, or None.
        """
        branch, scores, diagonality = self.attention(self.norm1(tokens), grid, scores, with_diagonality)
        if uniforms is not None:
            branch = drop_path(branch, uniforms[0], self.drop_rate)
        tokens = tokens + branch
        branch = self.mlp(self.norm2(tokens))
        if uniforms is not None:
            branch = drop_path(branch, uniforms[1], self.drop_rate)
        return tokens + branch, scores, diagonality
