"""One pre-norm transformer block: attention of either kind and an MLP, each on a residual branch."""

import importlib
from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention
from .config import Grid
from .diagonality import Diagonality

EPSILON = 1e-6
"""Below the variance of any live token; timm and the PVT family use the same."""


def layer_norm(width: int, kind: Literal["torch", "apex"] = "torch") -> nn.Module:
    """LayerNorm over the last `width` channels; both kinds have `weight` and `bias` and the same outputs.

    Raises:
        RuntimeError: 'apex' was asked for and is not there. apex says so only when the layer is constructed, not when
            it is imported; PyPI's package of that name is an unrelated toolkit for the Pyramid web framework.
    """
    if kind == "torch":
        return nn.LayerNorm(width, eps=EPSILON)
    try:
        fused = importlib.import_module("apex.normalization").FusedLayerNorm
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            "norm: 'apex' needs NVIDIA's apex, built from https://github.com/NVIDIA/apex with its CUDA extensions "
            "(PyPI's 'apex' is an unrelated web toolkit); norm: 'torch' needs nothing"
        ) from error
    try:
        layer: nn.Module = fused(width, eps=EPSILON)
    except (ImportError, RuntimeError) as error:
        raise RuntimeError(
            f"norm: 'apex' is installed without its CUDA extension ({error}); build it with --cpp_ext --cuda_ext, "
            "or use norm: 'torch'"
        ) from error
    return layer


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

    def __init__(
        self, width: int, attention: Attention, mlp_ratio: float, drop_rate: float, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.drop_rate = drop_rate
        self.norm1 = norm(width)
        self.attention = attention
        self.norm2 = norm(width)
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
