"""Other networks than LaViT to train: ``model.factory: examples.networks:ViT``, and ``CNN``.

They know nothing of this project, as networks of other packages do, and draw their random numbers themselves.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    """Self-attention and an MLP around residual connections, with stochastic depth (Huang et al. 2016)."""

    def __init__(self, width: int, heads: int, dropout: float, drop_path: float) -> None:
        super().__init__()
        self.heads, self.drop_path = heads, drop_path
        self.norm1, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, tokens, width) to the same."""
        q, k, v = self.qkv(self.norm1(tokens)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tokens = tokens + self._drop_path(self.dropout(self.proj(mixed)))
        hidden = self.dropout(F.gelu(self.fc1(self.norm2(tokens))))
        return tokens + self._drop_path(self.dropout(self.fc2(hidden)))

    def _drop_path(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return branch
        return branch * (torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path) / (1 - self.drop_path)


class ViT(nn.Module):
    """A Vision Transformer (Dosovitskiy et al. 2021) whose tokens are averaged.

    `image_size`, a side or (height, width), and `patch_size`, a side, are in pixels. The rate `drop_path` is the last
    block's; it grows linearly from 0 at the first.
    """

    def __init__(
        self,
        num_classes: int,
        image_size: int | tuple[int, int],
        *,
        patch_size: int = 4,
        width: int = 128,
        depth: int = 6,
        heads: int = 4,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        height, breadth = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.embed = nn.Conv2d(3, width, patch_size, patch_size)
        self.position = nn.Parameter(0.02 * torch.randn((height // patch_size) * (breadth // patch_size), width))
        rates = [drop_path * block / max(depth - 1, 1) for block in range(depth)]
        self.blocks = nn.ModuleList(Block(width, heads, dropout, rate) for rate in rates)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes)
        self._checkpointed = False

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) to logits (batch, num_classes)."""
        tokens = self.embed(images).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            recomputed = self._checkpointed and self.training
            tokens = checkpoint(block, tokens, use_reentrant=False) if recomputed else block(tokens)
        return self.head(self.norm(tokens).mean(1))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay spares, apart from vectors."""
        return {"position"}

    def layer_groups(self) -> list[list[str]]:
        """Names of all parameters in the order of depth: the embedding, block by block, the head."""
        blocks = [[f"blocks.{i}.{name}" for name, _ in block.named_parameters()] for i, block in enumerate(self.blocks)]
        return [["position", "embed.weight", "embed.bias"], *blocks,
                ["norm.weight", "norm.bias", "head.weight", "head.bias"]]  # fmt: skip

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks for the backward pass, or not."""
        self._checkpointed = enable

    def get_classifier(self) -> nn.Module:
        """The layer that makes logits of features."""
        return self.head


class Residual(nn.Module):
    """Two convolutions of 3 x 3 around a connection, which is projected where the shape changes (He et al. 2016)."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        same = before == width and stride == 1
        self.short = nn.Identity() if same else nn.Conv2d(before, width, 1, stride, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        """(batch, before, height, width) to (batch, width, height / stride, width / stride)."""
        return F.relu(self.short(maps) + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(maps))))))


class CNN(nn.Module):
    """A residual network with BatchNorm for small images: stages of `depths` blocks, `widths` channels each.

    Where the channels change, height and width are halved.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        widths: Sequence[int] = (32, 64, 128),
        depths: Sequence[int] = (1, 1, 1),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        conv = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.stem = nn.Sequential(conv, nn.BatchNorm2d(widths[0]), nn.ReLU())
        outputs = [width for width, depth in zip(widths, depths, strict=True) for _ in range(depth)]
        pairs = zip([widths[0], *outputs], outputs, strict=False)
        self.blocks = nn.Sequential(*(Residual(before, width, 1 + (width != before)) for before, width in pairs))
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) to logits (batch, num_classes)."""
        return self.head(self.dropout(self.blocks(self.stem(images)).mean((2, 3))))
