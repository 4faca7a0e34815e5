"""Semantic FPN on a LaViT: ``python -m examples.segmentation [--handoff runs/demo/handoff]``.

A label for each pixel of made pictures (`examples/shapes.py`), at a size other than the pretraining's. The same head is
trained twice for the same number of steps on the same pictures: on a backbone that is fine-tuned with it, and on the
same backbone frozen, the baseline.
"""

import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from examples.backbone import Backbone, load_backbone
from examples.pyramid import FeaturePyramid, conv_norm
from examples.shapes import CLASSES, EVALUATED, draw_many
from examples.training import Settings, fit, parse
from pretrain.outcome import UserError

COLOURS = np.array([(0, 0, 0), (230, 60, 60), (60, 200, 60), (70, 110, 255), (240, 200, 40)], np.uint8)


class SemanticFPN(nn.Module):
    """Panoptic FPN's semantic branch (Kirillov et al. 2019, arXiv 1901.02446).

    Each level of the pyramid is brought to the finest by convolutions with upsampling between them; their sum is
    classified, and the logits are enlarged to the picture.
    """

    def __init__(self, backbone: Backbone, classes: int, width: int = 32) -> None:
        super().__init__()
        self.backbone = backbone
        widths = backbone.net.config.widths
        self.pyramid = FeaturePyramid(widths, width)
        self.levels = nn.ModuleList(
            nn.ModuleList(conv_norm(width) for _ in range(max(1, level))) for level in range(len(widths))
        )
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, pictures: Tensor) -> Tensor:
        """(batch, 3, height, width) in 0..1 to logits (batch, classes, height, width)."""
        maps = self.pyramid(self.backbone(pictures))
        merged = torch.zeros_like(maps[0])
        for level, (features, steps) in enumerate(zip(maps, self.levels, strict=True)):
            x = features
            for step in steps:  # type: ignore[attr-defined]
                x = step(x)
                if level:
                    x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            merged = merged + x
        return F.interpolate(self.classify(merged), pictures.shape[-2:], mode="bilinear", align_corners=False)


def confusion(predicted: Tensor, truth: Tensor, classes: int) -> Tensor:
    """(classes, classes): pixels whose truth is the row and whose prediction is the column."""
    return torch.bincount((truth * classes + predicted).flatten(), minlength=classes**2).view(classes, classes)


def mean_iou(counts: Tensor) -> float:
    """Mean over classes of intersection over union, in percent, from a confusion; absent classes are left out."""
    hits, union = counts.diag(), counts.sum(0) + counts.sum(1) - counts.diag()
    return 100 * (hits[union > 0] / union[union > 0]).mean().item()


def train(model: SemanticFPN, settings: Settings) -> list[float]:
    """Train on pictures that are never seen twice; returns the loss of each step."""

    def losses() -> Iterator[Callable[[], Tensor]]:
        for step in itertools.count():
            scenes = draw_many(range(step * settings.batch, (step + 1) * settings.batch), settings.size)
            pictures, masks = (torch.stack([getattr(s, part) for s in scenes]) for part in ("picture", "mask"))
            yield lambda: F.cross_entropy(model(pictures), masks)  # noqa: B023 - called before the next turn

    return fit(model, losses(), settings.steps, settings.lr)


@torch.no_grad()
def evaluate(model: SemanticFPN, size: tuple[int, int], pictures: int) -> float:
    """Mean IoU in percent over pictures that no training sees, the ground counted as a class."""
    classes = len(CLASSES) + 1
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    for start in range(0, pictures, 25):
        scenes = draw_many(range(EVALUATED + start, EVALUATED + min(start + 25, pictures)), size)
        predicted = model(torch.stack([s.picture for s in scenes])).argmax(1)
        counts += confusion(predicted, torch.stack([s.mask for s in scenes]), classes)
    return mean_iou(counts)


@torch.no_grad()
def paint(model: SemanticFPN, size: tuple[int, int], path: Path, pictures: int = 6, zoom: int = 3) -> None:
    """Write pictures one below the other: as they are, with the truth over them, with the prediction over them."""
    rows = []
    for scene in draw_many(range(EVALUATED, EVALUATED + pictures), size):
        plain = (scene.picture.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        predicted = model(scene.picture[None]).argmax(1)[0]
        painted = [np.where((m > 0)[..., None], plain // 3 + COLOURS[m] // 3 * 2, plain)
                   for m in (scene.mask.numpy(), predicted.numpy())]  # fmt: skip
        rows.append(np.concatenate([plain, *painted], 1))
    sheet = np.concatenate(rows).repeat(zoom, 0).repeat(zoom, 1)
    Image.fromarray(sheet).save(path)


def compare(settings: Settings, seed: int) -> dict[str, Any]:
    """Train and evaluate both; returns what ``segmentation-SEED.json`` holds, beside which a picture is written."""
    result: dict[str, Any] = {"seed": seed, **dataclasses.asdict(settings)}
    for kind in ("frozen", "fine_tuned"):
        torch.manual_seed(seed)
        backbone, said = load_backbone(settings.handoff, settings.size, frozen=kind == "frozen")
        model = SemanticFPN(backbone, len(CLASSES) + 1)
        start = time.monotonic()
        losses = train(model, settings)
        seconds = time.monotonic() - start
        iou = evaluate(model, settings.size, settings.evaluated)
        result[kind] = {"mean_iou": iou, "loss": losses[-1], "seconds": seconds}
    result["backbone"] = said
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / f"segmentation-{seed}.json").write_text(json.dumps(result, indent=2, default=str) + "\n")
    paint(model, settings.size, settings.out / f"segmentation-{seed}.png")
    return result


def main(arguments: list[str] | None = None) -> int:
    """Train Semantic FPN on a LaViT, fine-tuned and frozen, and compare their mean IoU on made pictures."""
    settings, seeds = parse("python -m examples.segmentation", main.__doc__, arguments)
    for seed in seeds:
        try:
            result = compare(settings, seed)
        except (UserError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        frozen, tuned = result["frozen"], result["fine_tuned"]
        print(
            f"seed {seed}: mean IoU {tuned['mean_iou']:.1f} % fine-tuned in {tuned['seconds']:.0f} s, "
            f"{frozen['mean_iou']:.1f} % on frozen features in {frozen['seconds']:.0f} s ({result['backbone']})",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
