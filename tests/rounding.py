"""Bounds on rounding errors that follow from the arithmetic, not from the results of one processor.

Where a formula is checked, both sides are computed in float64: `torch.testing.assert_close` then allows 1e-7, some
hundred million times the rounding of one operation. Where a shorter type is the subject, its `relative_error` against
float64 is compared with `allowed_error`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def relative_error(result: Tensor | Sequence[Tensor], exact: Tensor | Sequence[Tensor]) -> float:
    """`|result - exact| / |exact|`, in Euclidean norms.

    Args:
        result: a tensor, or several that count as one vector.
        exact: the same, computed in float64.
    """
    results, exacts = ([one] if isinstance(one, Tensor) else list(one) for one in (result, exact))
    assert all(one.dtype == torch.float64 for one in exacts)
    difference = math.hypot(*((a.double() - b).norm().item() for a, b in zip(results, exacts, strict=True)))
    return difference / math.hypot(*(one.norm().item() for one in exacts))


def allowed_error(operations: int, terms: int, dtype: torch.dtype = torch.float32) -> float:
    """Relative error of so many operations in a row, each a sum of at most so many terms.

    A rounding errs by up to eps / 2, and n independent ones by about sqrt(n) eps / 2 (Higham and Mary 2019, "A new
    approach to probabilistic rounding error analysis"), in whichever order a processor sums. Twice that is allowed.
    """
    return math.sqrt(operations * terms) * torch.finfo(dtype).eps
