"""Vanilla Attention, Less Attention, and the class attention that pools the last stage.

Scores are kept KEY-MAJOR, (batch, heads, M keys, N queries): the transpose of the paper's matrices. Psi, the larger of
the two Linear layers of a Less Attention block, then acts on the last axis as one matrix product over the whole batch,
and its gradient is one too; the query axis is also where the attention residual pools, as an image. Nothing is
transposed in memory on the way from block to block.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Grid
from .diagonality import Diagonality, diagonality_loss, pool_queries
from .resample import resample_map, resample_table

Observer = Callable[[Tensor, Grid, Grid], None]
"""Receives softmaxed attention (batch, heads, M, N), the query grid and the key grid; see `models.diagnostics`."""


class _Product(torch.autograd.Function):
    """`torch.bmm`, whose gradients are computed in the memory order of their factors.

    `torch.mm` does so already. `torch.bmm` gives every gradient row by row; that of a transposed factor, such as Q^T
    in K Q^T, is then transposed in memory on its way back.
    """

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return torch.bmm(left, right)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        left, right = ctx.saved_tensors
        by_rows = left.stride(-1) == 1
        to_left = torch.bmm(gradient, right.mT) if by_rows else torch.bmm(right, gradient.mT).mT
        by_rows = right.stride(-1) == 1
        to_right = torch.bmm(left.mT, gradient) if by_rows else torch.bmm(gradient.mT, left).mT
        return to_left, to_right


def scores_of(keys: Tensor, queries: Tensor) -> Tensor:
    """`K Q^T`: (batch, heads, M, d) and (batch, heads, N, d) of one type to (batch, heads, M, N)."""
    product = _Product.apply(keys.flatten(0, 1), queries.flatten(0, 1).mT)
    return product.unflatten(0, keys.shape[:2])


def attended(attention: Tensor, values: Tensor) -> Tensor:
    """`A^T V`: attention (batch, heads, M, N), of any type, and values (batch, heads, M, d) to (batch, heads, N, d)."""
    product = _Product.apply(attention.to(values.dtype).flatten(0, 1).mT, values.flatten(0, 1))
    return product.unflatten(0, values.shape[:2])


class SpatialReduction(nn.Module):
    """One key for each `ratio` x `ratio` square of tokens: a strided convolution and a LayerNorm, as in PVT.

    The squares do not overlap, so the convolution is a Linear layer over the tokens of a square, row by row. Unlike a
    convolution's, its weight is in the layout that the product wants, and so is its gradient.
    """

    def __init__(self, width: int, ratio: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.ratio = ratio
        self.linear = nn.Linear(width * ratio**2, width)
        self.norm = norm(width)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """(batch, N, C) to (batch, M, C)."""
        batch, _, width = tokens.shape
        rows, columns = grid[0] // self.ratio, grid[1] // self.ratio
        squares = tokens.view(batch, rows, self.ratio, columns, self.ratio, width).transpose(2, 3)
        return self.norm(self.linear(squares.reshape(batch, rows * columns, -1)))


class TokenMap(nn.Module):
    """A Linear layer over the tokens of a grid, initialized to the identity (this project's choice).

    Its weight is stored for one grid. For any other it is resampled as a map from grid to grid while running, so a
    network accepts another image size at every call.
    """

    def __init__(self, grid: Grid, *, bias: bool) -> None:
        super().__init__()
        self.grid = grid
        tokens = grid[0] * grid[1]
        self.weight = nn.Parameter(torch.eye(tokens))
        self.bias = nn.Parameter(torch.zeros(tokens)) if bias else None

    def on_grid(self, grid: Grid) -> tuple[Tensor, Tensor | None]:
        """Weight (T, T) and bias (T,) for `grid`, T its number of tokens."""
        if grid == self.grid:
            return self.weight, self.bias
        weight = resample_map(self.weight, self.grid, grid)
        return weight, None if self.bias is None else resample_table(self.bias[:, None], self.grid, grid)[:, 0]


class Theta(TokenMap):
    """The Linear layer over key tokens, with a bias: it shifts a key for all queries."""

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid, bias=True)

    def forward(self, scores: Tensor, key_grid: Grid) -> Tensor:
        """Scores (batch, heads, M, N) to the same shape: `A W^T + 1 b^T` in the paper's orientation."""
        weight, bias = self.on_grid(key_grid)
        assert bias is not None
        heads = scores.flatten(0, 1)
        # One product a head, in the memory layout of the scores; torch.matmul would transpose them and back.
        return torch.baddbmm(bias[:, None], weight.expand(heads.shape[0], -1, -1), heads).view_as(scores)


class Psi(TokenMap):
    """The Linear layer over query tokens.

    Without a bias (this project's choice): it would add one number to all of a query's scores, which the softmax does
    not see; in the last block of a stage such a parameter never gets a gradient.
    """

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid, bias=False)

    def forward(self, scores: Tensor, grid: Grid) -> Tensor:
        """Scores (batch, heads, M, N) to the same shape: `W A` in the paper's orientation."""
        return F.linear(scores, self.on_grid(grid)[0])


class Attention(nn.Module):
    """What both kinds share: keys' grid, values, output projection, the diagonality loss, and an observer."""

    observer: Observer | None = None

    def __init__(self, width: int, heads: int, ratio: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.heads = heads
        self.ratio = ratio
        self.reduction = SpatialReduction(width, ratio, norm) if ratio > 1 else None
        self.proj = nn.Linear(width, width)

    def key_grid(self, grid: Grid) -> Grid:
        """The grid of keys for a grid of queries."""
        return (grid[0] // self.ratio, grid[1] // self.ratio)

    def reduced(self, tokens: Tensor, grid: Grid) -> Tensor:
        """The tokens that keys and values are made from: (batch, M, C)."""
        return tokens if self.reduction is None else self.reduction(tokens, grid)

    def split(self, features: Tensor) -> Tensor:
        """(batch, T, C) to (batch, heads, T, d), a view."""
        return features.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def merge(self, features: Tensor) -> Tensor:
        """(batch, heads, T, d) to (batch, T, C), projected."""
        return self.proj(features.transpose(1, 2).flatten(2))

    def attend(
        self, scores: Tensor, values: Tensor, grid: Grid, with_pooled: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Softmax over the keys, then the product with the values.

        Args:
            scores: (batch, heads, M, N).
            values: (batch, M, C).
            grid: query grid, N = height x width.
            with_pooled: whether to return `pool_queries` of the attention, too.

        Returns:
            The output (batch, N, C); the pooled attention (batch, heads, M, M) or None.
        """
        key_grid = self.key_grid(grid)
        attention = scores.softmax(dim=-2)
        if self.observer is not None:
            self.observer(attention, grid, key_grid)
        output = self.merge(attended(attention, self.split(values)))
        return output, pool_queries(attention, grid, key_grid) if with_pooled else None


class VanillaAttention(Attention):
    """`A = Q K^T / sqrt(d)`, output `softmax(A) V`, with spatially reduced keys and values.

    Keys and values have no bias (this project's choice): a key's bias adds one number to all of a query's scores,
    which the softmax does not see, and a value's bias is a part of the output projection's, as rows sum to one.
    """

    def __init__(
        self, width: int, heads: int, ratio: int, norm: Callable[[int], nn.Module], *, keeps_scores: bool
    ) -> None:
        super().__init__(width, heads, ratio, norm)
        self.keeps_scores = keeps_scores
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width, bias=False)

    def forward(
        self,
        tokens: Tensor,
        grid: Grid,
        initial: Tensor | None,
        with_diagonality: Diagonality,  # noqa: ARG002  the loss is defined on Less Attention blocks; both kinds are called alike
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Attend.

        Args:
            tokens: (batch, N, C).
            grid: query grid, N = height x width.
            initial: the attention residual (batch, heads, M, N), added before the softmax, or None.
            with_diagonality: no effect here.

        Returns:
            Output (batch, N, C); the pre-softmax scores (batch, heads, M, N) if this block keeps them; None.
        """
        query = self.split(self.q(tokens))
        keys, values = self.kv(self.reduced(tokens, grid)).chunk(2, dim=-1)
        key = self.split(keys)
        if initial is None and not self.keeps_scores and self.observer is None:
            # With the residual as its mask the fused kernel would be none: a mask that learns takes torch's plain way.
            output = F.scaled_dot_product_attention(query, key, self.split(values))
            if torch.compiler.is_exporting():
                # Its strides belong to the kernel; an exporter that takes the kernel apart gets others.
                output = output.contiguous()
            return self.merge(output), None, None
        scores = scores_of(key * query.shape[-1] ** -0.5, query)
        if initial is not None:
            scores = scores.add_(initial)
        return self.attend(scores, values, grid)[0], scores if self.keeps_scores else None, None


class LessAttention(Attention):
    """`A_l = Psi(Theta(A_{l-1})^T)^T`, output `softmax(A_l) V`: no queries, no keys.

    Theta acts on the key axis, Psi on the query axis; one pair a block, shared by the heads (this project's choice).
    Without `learned_maps` there is neither, and `A_l = A_{l-1}`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        ratio: int,
        norm: Callable[[int], nn.Module],
        grid: Grid,
        *,
        learned_maps: bool = True,
    ) -> None:
        super().__init__(width, heads, ratio, norm)
        self.v = nn.Linear(width, width, bias=False)
        self.theta = Theta(self.key_grid(grid)) if learned_maps else None
        self.psi = Psi(grid) if learned_maps else None

    def forward(
        self, tokens: Tensor, grid: Grid, scores: Tensor, with_diagonality: Diagonality
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Attend with scores made from the previous block's.

        Args:
            tokens: (batch, N, C).
            grid: query grid, N = height x width.
            scores: the previous block's pre-softmax scores (batch, heads, M, N).
            with_diagonality: whether to compute the diagonality loss.

        Returns:
            Output (batch, N, C); this block's scores (batch, heads, M, N); the diagonality loss or None.
        """
        if self.theta is not None and self.psi is not None:
            scores = self.psi(self.theta(scores, self.key_grid(grid)), grid)
        output, pooled = self.attend(scores, self.v(self.reduced(tokens, grid)), grid, bool(with_diagonality))
        if pooled is None:
            return output, scores, None
        return output, scores, diagonality_loss(pooled, as_printed=with_diagonality == "as_printed")


class ClassAttention(nn.Module):
    """One class token, the query, attends to all tokens of the last stage and so summarizes them.

    The class token stays out of the score matrices of the blocks, whose axes are grids (this project's choice). It is a
    constant, so it needs no query projection and no residual: both would fold into parameters that are here anyway.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.class_token = nn.Parameter(torch.empty(width))
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, N, C) to (batch, C)."""
        heads = (self.heads, -1)
        key, value = (half.unflatten(-1, heads).transpose(1, 2) for half in self.kv(tokens).chunk(2, dim=-1))
        query = self.class_token.to(key.dtype).view(1, self.heads, 1, -1).expand(tokens.shape[0], -1, -1, -1)
        return self.proj(F.scaled_dot_product_attention(query, key, value).flatten(1))
