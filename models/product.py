"""The batched matrix product of attention, with gradients that need not be copied."""

from typing import Any

import torch
from torch import Tensor


class _Product(torch.autograd.Function):
    """`torch.bmm`, whose gradients are computed in the memory order of their factors.

    `torch.mm` does so by itself. `torch.bmm` gives every gradient row by row; that of a transposed factor, such as Q^T
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
