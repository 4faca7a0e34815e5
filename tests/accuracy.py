"""Bounds of numerical tests that follow from the arithmetic, not from one machine."""

import torch
from torch import Tensor

ORDERS = 16
"""How much less accurate another order of the same operations may be; sums in blocks and fused multiply-adds differ by
small factors, a wrong term by thousands."""


def assert_as_accurate(got: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Two computations of the same in one precision are equally far from the result in float64.

    Where terms cancel, both lose the same digits, and a bound relative to either result would fail on some processors.

    Args:
        got: the computation under test, any shape.
        plain: the same by plain operations, in the same precision.
        exact: the same in float64.
    """
    assert got.dtype == plain.dtype
    assert exact.dtype == torch.float64
    error, usual = ((one.double() - exact).norm() for one in (got, plain))
    bound = ORDERS * (usual + torch.finfo(got.dtype).eps * exact.norm())
    assert error <= bound, f"error {error:.3g}, of plain operations {usual:.3g}, norm {exact.norm():.3g}"
