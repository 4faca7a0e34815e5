"""Segmentation with a LaViT: ``python -m examples.segmentation --handoff runs/demo/handoff``.

Labels each pixel of synthetic images (`examples/shapes.py`), at another size than the pretraining's. The same head is
trained twice for the same steps on the same images: on a backbone that is fine-tuned with it, and on it frozen.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from examples.shapes import CLASSES, EVALUATED, draw_many
from models import LaViT, load_weights
from pretrain.handoff import load_handoff
from pretrain.outcome import UserError

COLORS = np.array([(0, 0, 0), (230, 60, 60), (60, 200, 60), (70, 110, 255), (240, 200, 40)], np.uint8)
BACKBONE_RATE = 0.25
"""Share of the head's learning rate for a fine-tuned backbone: with all of it, some seeds did not learn."""


class Segmenter(nn.Module):
    """A head as SegFormer's (Xie et al. 2021, arXiv 2105.15203) on the four maps of a LaViT.

    The maps come before LaViT's final norm and grow from block to block, so each is normalized first. All are
    projected to `width` channels, brought to the finest one's size and classified together.
    """

    def __init__(self, backbone: LaViT, mean: Sequence[float], std: Sequence[float], width: int = 64) -> None:
        super().__init__()
        self.backbone, widths = backbone, backbone.config.widths
        self.mean, self.std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in widths)
        self.projections = nn.ModuleList(nn.Linear(channels, width) for channels in widths)
        fuse = nn.Conv2d(len(widths) * width, width, 3, padding=1, bias=False)
        self.classify = nn.Sequential(fuse, nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, len(CLASSES) + 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) in 0..1 to logits (batch, classes, height, width)."""
        maps = self.backbone.forward_features((images - self.mean) / self.std)
        levels = []
        for norm, projection, one in zip(self.norms, self.projections, maps, strict=True):
            projected = projection(norm(one.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
            levels.append(F.interpolate(projected, maps[0].shape[-2:], mode="bilinear"))
        return F.interpolate(self.classify(torch.cat(levels, 1)), images.shape[-2:], mode="bilinear")


def build(handoff: Path, size: tuple[int, int], *, frozen: bool) -> tuple[Segmenter, str]:
    """A network for images of ``size`` (height, width) on a hand-off's backbone, and a line about its origin.

    Psi, Theta and the position embeddings are resampled once.

    Raises:
        UserError: no hand-off.
        ValueError: a side is not a multiple of the network's stride.
    """
    source, config = load_handoff(handoff)
    net = LaViT(dataclasses.replace(source.config, image_size=size))
    resampled = load_weights(net, source.state_dict())
    before, after = ("{} x {}".format(*grid) for grid in (source.config.image_size, size))
    origin = f"{net.config.name} of {handoff}, pretrained at {before}; {len(resampled)} tensors resampled to {after}"
    return Segmenter(net.requires_grad_(not frozen), config.input.mean, config.input.std), origin


def train(model: nn.Module, options: argparse.Namespace) -> None:
    """Train on images that are never seen twice: AdamW, warm-up for a tenth of the steps, cosine to zero."""
    parts: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        parts[name.startswith("backbone.")].append(parameter)
    optimizer = torch.optim.AdamW([{"params": parts[True]}, {"params": parts[False]}], weight_decay=0.05)
    rates = [options.lr * BACKBONE_RATE, options.lr]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=options.steps, pct_start=0.1)
    model.train()
    for step in range(options.steps):
        images, masks = draw_many(range(step * options.batch, (step + 1) * options.batch), options.image_size)
        loss = F.cross_entropy(model(images), masks)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def evaluate(model: nn.Module, size: tuple[int, int], images: int) -> float:
    """Mean intersection over union in percent, over images that no training sees; the background is a class."""
    from torchmetrics.classification import MulticlassJaccardIndex  # noqa: PLC0415 - slow to import

    drawn, masks = draw_many(range(EVALUATED, EVALUATED + images), size)
    return 100 * MulticlassJaccardIndex(len(CLASSES) + 1)(model(drawn).argmax(1), masks).item()


@torch.no_grad()
def paint(model: nn.Module, size: tuple[int, int], path: Path, images: int = 6, zoom: int = 3) -> None:
    """Write images one below the other: the image, with the truth over it, with the prediction over it."""
    rows = []
    for image, mask in zip(*draw_many(range(EVALUATED, EVALUATED + images), size), strict=True):
        plain = (image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        labels = mask.numpy(), model(image[None]).argmax(1)[0].numpy()
        over = [np.where((m > 0)[..., None], plain // 3 + COLORS[m] // 3 * 2, plain) for m in labels]
        rows.append(np.concatenate([plain, *over], axis=1))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows).repeat(zoom, 0).repeat(zoom, 1)).save(path)


def main(arguments: list[str] | None = None) -> int:
    """Train a segmentation head on a LaViT, fine-tuned and frozen, and compare their mean IoU on synthetic images."""
    parser = argparse.ArgumentParser(prog="python -m examples.segmentation", description=main.__doc__)
    parser.add_argument("--handoff", type=Path, required=True, help="the backbone's weights")
    parser.add_argument("--image-size", type=int, nargs=2, default=(64, 96), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=16, help="images per step (default: 16)")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate (default: 2e-3)")
    parser.add_argument("--evaluated", type=int, default=200, help="images evaluated (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the head")
    parser.add_argument("--out", type=Path, default=Path("runs/examples"), help="folder of the images")
    options = parser.parse_args(arguments)
    size = options.image_size = tuple(options.image_size)
    for frozen, kind in ((True, "on frozen features"), (False, "fine-tuned")):
        torch.manual_seed(options.seed)
        try:
            model, origin = build(options.handoff, size, frozen=frozen)
        except (UserError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        began = time.monotonic()
        train(model, options)
        iou, seconds = evaluate(model, size, options.evaluated), time.monotonic() - began
        print(f"mean IoU {iou:.1f} % {kind} in {seconds:.0f} s ({origin})", flush=True)
    paint(model, size, options.out / f"segmentation-{options.seed}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
