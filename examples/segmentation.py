"""Semantic FPN on a LaViT: ``python -m examples.segmentation [--handoff runs/demo/handoff]``.

A label for each pixel of made pictures (`examples/shapes.py`), at a size other than the pretraining's. The same head is
trained twice for the same number of steps on the same pictures: on a backbone that is fine-tuned with it, and on the
same backbone frozen, the baseline.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from examples.backbone import Backbone, load_backbone
from examples.pyramid import FeaturePyramid, conv_norm
from examples.shapes import CLASSES, EVALUATED, Scene, draw_many
from examples.training import Settings, evaluated_scenes, run_seeds, train, write_result

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


def segmentation_loss(model: SemanticFPN, pictures: Tensor, scenes: list[Scene]) -> Tensor:
    """Cross-entropy of the pixels."""
    return F.cross_entropy(model(pictures), _masks(scenes))


def _masks(scenes: list[Scene]) -> Tensor:
    return torch.stack([scene.mask for scene in scenes])


@torch.no_grad()
def evaluate(model: SemanticFPN, size: tuple[int, int], pictures: int) -> float:
    """Mean IoU in percent over pictures that no training sees, the ground counted as a class."""
    classes = len(CLASSES) + 1
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    for batch, scenes in evaluated_scenes(size, pictures):
        counts += confusion(model(batch).argmax(1), _masks(scenes), classes)
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


def compare(settings: Settings, seed: int) -> str:
    """Train and evaluate both, write ``segmentation-SEED.json`` and a picture beside it; returns a line about it."""
    result: dict[str, Any] = {"seed": seed}
    for kind in ("frozen", "fine_tuned"):
        torch.manual_seed(seed)
        backbone, said = load_backbone(settings.handoff, settings.size, frozen=kind == "frozen")
        model = SemanticFPN(backbone, len(CLASSES) + 1)
        spent = train(model, settings, partial(segmentation_loss, model))
        result[kind] = spent | {"mean_iou": evaluate(model, settings.size, settings.evaluated)}
    picture = write_result(settings, f"segmentation-{seed}", result | {"backbone": said})
    paint(model, settings.size, picture)
    frozen, tuned = result["frozen"], result["fine_tuned"]
    return (
        f"mean IoU {tuned['mean_iou']:.1f} % fine-tuned in {tuned['seconds']:.0f} s, "
        f"{frozen['mean_iou']:.1f} % on frozen features in {frozen['seconds']:.0f} s ({said})"
    )


def main(arguments: list[str] | None = None) -> int:
    """Train Semantic FPN on a LaViT, fine-tuned and frozen, and compare their mean IoU on made pictures."""
    return run_seeds("python -m examples.segmentation", main.__doc__, arguments, compare)


if __name__ == "__main__":
    sys.exit(main())
