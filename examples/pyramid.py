"""A feature pyramid (FPN, Lin et al. 2017, arXiv 1612.03144) on the maps of a LaViT."""

from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn


class FeaturePyramid(nn.Module):
    """Brings four maps to one width and lets each coarser one flow into the next finer one.

    LaViT's maps come from before its final norm and grow from block to block, so each is normed first.
    """

    def __init__(self, widths: Sequence[int], width: int) -> None:
        super().__init__()
        self.norms = cast("Sequence[nn.Module]", nn.ModuleList(nn.LayerNorm(channels) for channels in widths))
        self.laterals = cast("Sequence[nn.Module]", nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in widths))
        self.outputs = cast("Sequence[nn.Module]", nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in widths))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (batch, widths[m], h, w), each half as large as the one before, to (batch, width, h, w)."""
        # The maps lie in memory as tokens, channels last. (On such an input that wants no gradient, as frozen features
        # do, GroupNorm's backward pass ends the process in torch 2.13 on a CPU.)
        normed = [norm(m.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for norm, m in zip(self.norms, maps, strict=True)]
        laterals = [lateral(m) for lateral, m in zip(self.laterals, normed, strict=True)]
        merged = laterals[-1:]
        for finer in reversed(laterals[:-1]):
            merged.insert(0, finer + F.interpolate(merged[0], size=finer.shape[-2:], mode="nearest"))
        return [output(m) for output, m in zip(self.outputs, merged, strict=True)]


def conv_norm(width: int) -> nn.Sequential:
    """A 3 x 3 convolution, GroupNorm and ReLU that keep the shape (batch, width, h, w)."""
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(8, width), nn.ReLU())
