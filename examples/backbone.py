"""A LaViT as the trunk of a dense head: from a hand-off, at another picture size; trained with the head or frozen."""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn

from data_pipeline.transforms import IMAGENET_MEAN, IMAGENET_STD
from models import LaViT, create_model, load_weights
from pretrain.handoff import load_handoff


class Backbone(nn.Module):
    """Pictures in 0..1 to the four maps of a LaViT."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: LaViT, mean: tuple[float, ...], std: tuple[float, ...], *, frozen: bool) -> None:
        super().__init__()
        self.net = net
        self.frozen = frozen
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])
        self.requires_grad_(not frozen)
        for unused in (net.norm, net.pool, net.head):  # they classify
            if unused is not None:
                unused.requires_grad_(requires_grad=False)

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """(batch, 3, height, width) to maps at strides 4, 8, 16 and 32 (for patches of 4)."""
        with torch.set_grad_enabled(not self.frozen and torch.is_grad_enabled()):
            return self.net.forward_features((pictures - self.mean) / self.std)


def load_backbone(handoff: Path | None, size: tuple[int, int], *, frozen: bool) -> tuple[Backbone, str]:
    """A backbone for pictures of `size`, and a line that says where it comes from.

    Args:
        handoff: a hand-off's folder; None starts a `lavit_micro` at random, from torch's generator.
        size: height and width in pixels. Psi, Theta and the position embeddings are resampled to it, once.
        frozen: whether its weights stay as they are.

    Raises:
        UserError: no hand-off.
        ValueError: a side is not a multiple of the network's stride.
    """
    if handoff is None:
        net = create_model("lavit_micro", num_classes=1, image_size=size)
        return Backbone(net, IMAGENET_MEAN, IMAGENET_STD, frozen=frozen), f"{net.config.name}, random weights"
    source, config = load_handoff(handoff)
    net = LaViT(dataclasses.replace(source.config, image_size=size))
    resampled = load_weights(net, source.state_dict())
    before, after = ("{} x {}".format(*grid) for grid in (source.config.image_size, size))
    said = f"{net.config.name} of {handoff}, pretrained at {before}; {len(resampled)} tensors resampled to {after}"
    return Backbone(net, config.input.mean, config.input.std, frozen=frozen), said
