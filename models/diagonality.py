"""The diagonality-preserving loss: attention should be symmetric, with a dominant diagonal."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import Grid

Diagonality = bool | Literal["as_printed"]
"""Whether a forward pass computes the loss, or its second term with the paper's printed sign."""


def diagonality_loss(attention: Tensor, *, as_printed: bool = False) -> Tensor:
    r"""The intended diagonality-preserving loss of a batch of square attention matrices.

    `mean over matrices of 1/N ( sum_ij |A_ij - A_ji| + sum_i ( sum_{j != i} A_ij - (N - 1) A_ii ) )`

    Three choices of this project. The sign of the second term is the paper's flipped: as printed, minimising it pushes
    the diagonal down, against its stated purpose. The loss reads softmaxed attention, where the second term is
    `N - N trace(A)` and therefore bounded. It is normalized per token and averaged over the matrices, so that its
    weight in the total loss does not depend on the size of the batch or on the number of heads.

    Args:
        attention: (..., N, N), probabilities over the last axis or over the one before it: both terms are the same for
            the transposed matrix.
        as_printed: give the second term the paper's printed sign, normalized and averaged in the same way. For
            comparison only.

    Returns:
        A scalar in fp32 (fp64 for fp64), within [1 - N, 3]; as printed within [-1, N + 1].
    """
    attention = attention if attention.dtype == torch.float64 else attention.float()
    tokens = attention.shape[-1]
    asymmetry = (attention - attention.transpose(-2, -1)).abs().sum((-2, -1))
    trace = attention.diagonal(dim1=-2, dim2=-1).sum(-1)
    sign = -1 if as_printed else 1
    return ((asymmetry + sign * attention.sum((-2, -1))) / tokens - sign * trace).mean()


def diagonality_loss_as_printed(matrix: Tensor) -> Tensor:
    """The paper's printed formula: `sum_ij |A_ij - A_ji| + sum_i ((N - 1) A_ii - sum_{j != i} A_ij)`.

    For comparison only. Minimised, it lowers the diagonal; on raw scores it has no lower bound.

    Args:
        matrix: (..., N, N), scores or probabilities.

    Returns:
        A scalar of the matrix's dtype: the plain sum over all the matrices.
    """
    tokens = matrix.shape[-1]
    asymmetry = (matrix - matrix.transpose(-2, -1)).abs().sum()
    return asymmetry + tokens * matrix.diagonal(dim1=-2, dim2=-1).sum() - matrix.sum()


def pool_queries(attention: Tensor, grid: Grid, key_grid: Grid) -> Tensor:
    """Average the queries that share a key's place, which makes reduced attention square (this project's choice).

    Args:
        attention: (batch, heads, M, N): keys on the axis before the last, as in `models.attention`.
        grid: query grid, N = height x width.
        key_grid: key grid, M = height x width; each side divides the query grid's.

    Returns:
        (batch, heads, M, M): entry (k, q) is the attention that the queries at place q pay to key k.
    """
    if grid == key_grid:
        return attention
    batch, heads, keys, _ = attention.shape
    kernel = (grid[0] // key_grid[0], grid[1] // key_grid[1])
    return F.avg_pool2d(attention.reshape(batch, heads * keys, *grid), kernel).view(batch, heads, keys, keys)
