"""Layer normalisation: torch's, or the fused one of NVIDIA's apex."""

import importlib
from typing import Literal

from torch import nn

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
