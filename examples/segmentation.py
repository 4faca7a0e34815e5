"""Semantic FPN on a LaViT: ``python -m examples.segmentation [--handoff runs/demo/handoff]``.

Labels each pixel of synthetic images (`examples/shapes.py`), at another size than the pretraining's. The same head is
trained twice for the same steps on the same images: on a backbone that is fine-tuned with it, and on it frozen.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from examples.shapes import CLASSES, EVALUATED, draw_many
from models import LaViT, create_model, load_weights
from pretrain.handoff import load_handoff
from pretrain.outcome import UserError

COLORS = np.array([(0, 0, 0), (230, 60, 60), (60, 200, 60), (70, 110, 255), (240, 200, 40)], np.uint8)
BACKBONE_RATE = 0.25
"""Share of the head's learning rate for a fine-tuned backbone: with all of it, some seeds did not learn."""


class Backbone(nn.Module):
    """Images in 0..1 to the four maps of a LaViT.

    Args:
        net: the network.
        mean: of the input, per channel.
        std: of the input, per channel.
        frozen: whether its weights stay as they are.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: LaViT, mean: Sequence[float], std: Sequence[float], *, frozen: bool) -> None:
        super().__init__()
        self.net, self.frozen = net, frozen
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])
        self.requires_grad_(not frozen)
        for unused in (net.norm, net.pool, net.head):  # of the classifier
            if unused is not None:
                unused.requires_grad_(requires_grad=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(batch, 3, height, width) to maps (batch, C, h, w) at strides 4, 8, 16 and 32 (for patches of 4)."""
        with torch.set_grad_enabled(not self.frozen and torch.is_grad_enabled()):
            return self.net.forward_features((images - self.mean) / self.std)


def load_backbone(handoff: Path | None, size: tuple[int, int], *, frozen: bool) -> tuple[Backbone, str]:
    """A backbone for images of ``size`` (height, width), and a line about its origin.

    Psi, Theta and the position embeddings of a hand-off are resampled once; without one, a ``lavit_micro`` starts at
    random.

    Raises:
        UserError: no hand-off.
        ValueError: a side is not a multiple of the network's stride.
    """
    if handoff is None:
        net = create_model("lavit_micro", num_classes=1, image_size=size)
        return Backbone(net, [0.5] * 3, [0.5] * 3, frozen=frozen), f"{net.config.name}, random weights"
    source, config = load_handoff(handoff)
    net = LaViT(dataclasses.replace(source.config, image_size=size))
    resampled = load_weights(net, source.state_dict())
    before, after = ("{} x {}".format(*grid) for grid in (source.config.image_size, size))
    origin = f"{net.config.name} of {handoff}, pretrained at {before}; {len(resampled)} tensors resampled to {after}"
    return Backbone(net, config.input.mean, config.input.std, frozen=frozen), origin


class SemanticFPN(nn.Module):
    """A feature pyramid (Lin et al. 2017, arXiv 1612.03144) with Panoptic FPN's semantic branch (arXiv 1901.02446).

    LaViT's maps come before its final norm and grow from block to block, so each is normalized first. Each level of the
    pyramid is brought to the finest by convolutions and upsampling; their sum is classified.
    """

    def __init__(self, backbone: Backbone, classes: int, width: int = 32) -> None:
        super().__init__()
        self.backbone, widths = backbone, backbone.net.config.widths
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in widths)
        self.laterals = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in widths)
        self.outputs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in widths)
        self.levels = nn.ModuleList(
            nn.Sequential(
                *(
                    nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(8, width), nn.ReLU(),
                                  nn.Upsample(scale_factor=2 if level else 1, mode="bilinear"))
                    for _ in range(max(1, level))
                )
            )
            for level in range(len(widths))
        )  # fmt: skip
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) in 0..1 to logits (batch, classes, height, width)."""
        # The maps are channels-last in memory. (GroupNorm's backward pass on such an input without gradient, as frozen
        # features are, crashes in torch 2.13 on a CPU.)
        maps = self.backbone(images)
        normed = [norm(m.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for norm, m in zip(self.norms, maps, strict=True)]
        laterals = [lateral(m) for lateral, m in zip(self.laterals, normed, strict=True)]
        merged = laterals[-1:]
        for finer in reversed(laterals[:-1]):
            merged.insert(0, finer + F.interpolate(merged[0], size=finer.shape[-2:], mode="nearest"))
        parts = zip(self.levels, self.outputs, merged, strict=True)
        total = torch.stack([level(output(m)) for level, output, m in parts]).sum(0)
        return F.interpolate(self.classify(total), images.shape[-2:], mode="bilinear")


def train(model: nn.Module, options: argparse.Namespace) -> dict[str, float]:
    """Train on images that are never seen twice: AdamW, warm-up for a tenth of the steps, cosine to zero.

    Returns:
        the loss of the last step, and seconds.
    """
    began, groups, rates = time.monotonic(), [], []
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        groups.append({"params": [parameter], "weight_decay": 0.05 if parameter.ndim > 1 else 0.0})
        rates.append(options.lr * (BACKBONE_RATE if name.startswith("backbone.") else 1))
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=options.steps, pct_start=0.1, cycle_momentum=False, div_factor=100,
        final_div_factor=100,
    )  # fmt: skip
    loss = torch.zeros(())
    model.train()
    for step in range(options.steps):
        images, masks = draw_many(range(step * options.batch, (step + 1) * options.batch), options.image_size)
        loss = F.cross_entropy(model(images), masks)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    return {"loss": loss.item(), "seconds": time.monotonic() - began}


@torch.no_grad()
def evaluate(model: SemanticFPN, size: tuple[int, int], images: int) -> float:
    """Mean intersection over union in percent, over images that no training sees; the background is a class."""
    from torchmetrics.classification import MulticlassJaccardIndex  # noqa: PLC0415 - slow to import

    metric = MulticlassJaccardIndex(len(CLASSES) + 1)
    for start in range(0, images, 25):
        batch, masks = draw_many(range(EVALUATED + start, EVALUATED + min(start + 25, images)), size)
        metric.update(model(batch).argmax(1), masks)
    return 100 * metric.compute().item()


@torch.no_grad()
def paint(model: SemanticFPN, size: tuple[int, int], path: Path, images: int = 6, zoom: int = 3) -> None:
    """Write images one below the other: the image, with the truth over it, with the prediction over it."""
    rows = []
    for image, mask in zip(*draw_many(range(EVALUATED, EVALUATED + images), size), strict=True):
        plain = (image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        predicted = model(image[None]).argmax(1)[0]
        painted = [np.where((m > 0)[..., None], plain // 3 + COLORS[m] // 3 * 2, plain)
                   for m in (mask.numpy(), predicted.numpy())]  # fmt: skip
        rows.append(np.concatenate([plain, *painted], 1))
    Image.fromarray(np.concatenate(rows).repeat(zoom, 0).repeat(zoom, 1)).save(path)


def compare(options: argparse.Namespace, seed: int) -> str:
    """Train and evaluate both, write ``segmentation-SEED.json`` and ``.png``; returns a line about it."""
    result: dict[str, Any] = vars(options) | {"seed": seed}
    for kind in ("frozen", "fine_tuned"):
        torch.manual_seed(seed)
        backbone, origin = load_backbone(options.handoff, options.image_size, frozen=kind == "frozen")
        model = SemanticFPN(backbone, len(CLASSES) + 1)
        result[kind] = train(model, options) | {"mean_iou": evaluate(model, options.image_size, options.evaluated)}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"segmentation-{seed}.json"
    path.write_text(json.dumps(result | {"backbone": origin}, indent=2, default=str) + "\n")
    paint(model, options.image_size, path.with_suffix(".png"))
    frozen, tuned = result["frozen"], result["fine_tuned"]
    return (
        f"mean IoU {tuned['mean_iou']:.1f} % fine-tuned in {tuned['seconds']:.0f} s, "
        f"{frozen['mean_iou']:.1f} % on frozen features in {frozen['seconds']:.0f} s ({origin})"
    )


def main(arguments: list[str] | None = None) -> int:
    """Train Semantic FPN on a LaViT, fine-tuned and frozen, and compare their mean IoU on synthetic images."""
    parser = argparse.ArgumentParser(prog="python -m examples.segmentation", description=main.__doc__)
    parser.add_argument("--handoff", type=Path, help="the backbone's weights; without it they are random")
    parser.add_argument("--image-size", type=int, nargs=2, default=(64, 96), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=16, help="images per step (default: 16)")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate (default: 2e-3)")
    parser.add_argument("--evaluated", type=int, default=200, help="images evaluated (default: 200)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of heads and random backbones")
    parser.add_argument("--out", type=Path, default=Path("runs/examples"), help="folder of JSON and images")
    options = parser.parse_args(arguments)
    options.image_size = tuple(options.image_size)
    for seed in options.seeds:
        try:
            print(f"seed {seed}: {compare(options, seed)}", flush=True)
        except (UserError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
