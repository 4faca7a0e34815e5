"""RetinaNet on a LaViT: ``python -m examples.detection [--handoff runs/demo/handoff]``.

Boxes and classes of the shapes on made pictures (`examples/shapes.py`), at a size other than the pretraining's.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from examples.backbone import Backbone, load_backbone
from examples.boxes import Detections, average_precision, giou_loss, iou, suppress
from examples.pyramid import FeaturePyramid, conv_norm
from examples.shapes import CLASSES, EVALUATED, Scene, draw_many
from examples.training import Settings, evaluated_scenes, run_seeds, train, write_result

SCALES = (3.0, 4.5)
"""Sides of a place's two square anchors, in strides of its level."""
COLOURS = ((230, 60, 60), (60, 200, 60), (70, 110, 255), (240, 200, 40))


class RetinaNet(nn.Module):
    """RetinaNet (Lin et al. 2017, arXiv 1708.02002) with square anchors on the four levels of a pyramid.

    One head of two branches is shared by the levels: for each anchor a score for each class, and how far and by what
    factor its box differs.
    """

    def __init__(self, backbone: Backbone, classes: int, width: int = 32) -> None:
        super().__init__()
        self.backbone = backbone
        self.pyramid = FeaturePyramid(backbone.net.config.widths, width)
        anchors = len(SCALES)
        self.scores = nn.Sequential(
            *(conv_norm(width) for _ in range(2)), nn.Conv2d(width, anchors * classes, 3, padding=1)
        )
        self.shifts = _branch(width, anchors * 4)
        # Nearly all anchors are ground: starting at their share keeps the first steps from being about nothing else.
        nn.init.constant_(self.scores[-1].bias, -math.log((1 - 0.01) / 0.01))  # type: ignore[arg-type]

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(batch, 3, height, width) in 0..1 to logits (batch, K, classes), shifts (batch, K, 4) and anchors (K, 4)."""
        levels = self.pyramid(self.backbone(pictures))
        config = self.backbone.net.config
        anchors = [
            place_anchors((m.shape[2], m.shape[3]), config.patch_size * 2**level) for level, m in enumerate(levels)
        ]
        logits, shifts = (
            torch.cat([_by_anchor(branch(m)) for m in levels], 1) for branch in (self.scores, self.shifts)
        )
        return logits, shifts, torch.cat(anchors)


def _branch(width: int, outputs: int) -> nn.Sequential:
    last = nn.Conv2d(width, outputs, 3, padding=1)
    nn.init.normal_(last.weight, std=0.01)
    return nn.Sequential(conv_norm(width), conv_norm(width), last)


def _by_anchor(output: Tensor) -> Tensor:
    """(batch, anchors x values, h, w) to (batch, h x w x anchors, values)."""
    return output.unflatten(1, (len(SCALES), -1)).permute(0, 3, 4, 1, 2).flatten(1, 3)


def place_anchors(grid: tuple[int, int], stride: int) -> Tensor:
    """(rows x columns x len(SCALES), 4): boxes in pixels about the middle of each place of a level."""
    rows, columns = torch.meshgrid(*(torch.arange(side) + 0.5 for side in grid), indexing="ij")
    centres = torch.stack([columns, rows], -1)[:, :, None] * stride
    halves = torch.tensor(SCALES)[:, None] * stride / 2
    return torch.cat([centres - halves, centres + halves], -1).flatten(0, 2)


def decode(anchors: Tensor, shifts: Tensor) -> Tensor:
    """Boxes (..., K, 4) that shifts (..., K, 4) make of anchors (K, 4): moves in sides, then factors as logarithms."""
    sides = anchors[:, 2:] - anchors[:, :2]
    centres = (anchors[:, 2:] + anchors[:, :2]) / 2 + shifts[..., :2] * sides
    halves = sides * shifts[..., 2:].clamp(-4, 4).exp() / 2
    return torch.cat([centres - halves, centres + halves], -1)


def assign(anchors: Tensor, boxes: Tensor) -> Tensor:
    """(K,): the box that each anchor has to find, -1 for the ground, -2 where neither would be right.

    At least 0.5 IoU is the box, below 0.4 is ground. Each box also gets its best anchor, or small ones had none.
    """
    overlaps = iou(anchors, boxes)
    best, owner = overlaps.max(1)
    owner = torch.where(best >= 0.5, owner, torch.where(best < 0.4, -1, -2))
    owner[overlaps.argmax(0)] = torch.arange(len(boxes))
    return owner


def focal_loss(logits: Tensor, wanted: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """`-alpha_t (1 - p_t)^gamma log p_t`, summed: what is easy already weighs little. Both (K, classes)."""
    loss = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    wrong = (logits.sigmoid() - wanted).abs()
    return ((alpha * wanted + (1 - alpha) * (1 - wanted)) * wrong**gamma * loss).sum()


def detection_loss(logits: Tensor, shifts: Tensor, anchors: Tensor, scenes: list[Scene]) -> Tensor:
    """Focal loss of the classes and GIoU loss of the boxes, over the number of anchors that have a box."""
    total, assigned = torch.zeros(()), 0
    for picture, scene in enumerate(scenes):
        owner = assign(anchors, scene.boxes)
        has_box, decided = owner >= 0, owner >= -1
        wanted = torch.zeros_like(logits[picture])
        wanted[has_box, scene.labels[owner[has_box]]] = 1
        total = total + focal_loss(logits[picture, decided], wanted[decided])
        predicted = decode(anchors, shifts[picture])[has_box]
        total = total + giou_loss(predicted, scene.boxes[owner[has_box]]).sum()
        assigned += int(has_box.sum())
    return total / max(assigned, 1)


@torch.no_grad()
def detect(model: RetinaNet, pictures: Tensor, least: float = 0.05, most: int = 100) -> list[Detections]:
    """What is on each of (batch, 3, height, width): up to `most` boxes that score at least `least`, without doubles."""
    logits, shifts, anchors = model(pictures)
    results = []
    for scores, boxes in zip(logits.sigmoid(), decode(anchors, shifts), strict=True):
        best, labels = scores.max(1)
        kept = best.topk(min(most, len(best))).indices
        kept = kept[best[kept] >= least]
        # Boxes of different classes do not suppress each other: they are moved apart.
        apart = boxes[kept] + labels[kept, None] * 10_000.0
        kept = kept[suppress(apart, best[kept])]
        results.append(Detections(boxes[kept], labels[kept], best[kept]))
    return results


def evaluate(model: RetinaNet, size: tuple[int, int], pictures: int) -> float:
    """AP50 in percent over pictures that no training sees."""
    found, truth = [], []
    for batch, scenes in evaluated_scenes(size, pictures):
        found += detect(model, batch)
        truth += [Detections(scene.boxes, scene.labels, torch.ones(len(scene.labels))) for scene in scenes]
    return average_precision(found, truth, len(CLASSES))


def paint(model: RetinaNet, size: tuple[int, int], path: Path, pictures: int = 6, zoom: int = 3) -> None:
    """Write pictures one below the other: with the boxes of the truth, and with those found at a score of 0.3."""
    rows = []
    for scene in draw_many(range(EVALUATED, EVALUATED + pictures), size):
        found = detect(model, scene.picture[None], least=0.3)[0]
        plain = (scene.picture.permute(1, 2, 0).numpy() * 255).astype(np.uint8).repeat(zoom, 0).repeat(zoom, 1)
        pair = []
        for boxes, labels in ((scene.boxes, scene.labels), (found.boxes, found.labels)):
            image = Image.fromarray(plain)
            brush = ImageDraw.Draw(image)
            for box, label in zip(boxes.tolist(), labels.tolist(), strict=True):
                brush.rectangle([zoom * side for side in box], outline=COLOURS[label], width=2)
            pair.append(np.asarray(image))
        rows.append(np.concatenate(pair, 1))
    Image.fromarray(np.concatenate(rows)).save(path)


def run(settings: Settings, seed: int) -> str:
    """Train and evaluate, write ``detection-SEED.json`` and a picture beside it; returns a line about it."""
    torch.manual_seed(seed)
    backbone, said = load_backbone(settings.handoff, settings.size, frozen=False)
    model = RetinaNet(backbone, len(CLASSES)).eval()
    untrained = evaluate(model, settings.size, settings.evaluated)

    def loss_of(pictures: Tensor, scenes: list[Scene]) -> Tensor:
        logits, shifts, anchors = model(pictures)
        return detection_loss(logits, shifts, anchors, scenes)

    spent = train(model, settings, loss_of)
    ap50 = evaluate(model, settings.size, settings.evaluated)
    result = {"seed": seed, "backbone": said, "ap50_untrained": untrained, **spent, "ap50": ap50}
    picture = write_result(settings, f"detection-{seed}", result)
    paint(model, settings.size, picture)
    return f"AP50 {ap50:.1f} % after {spent['seconds']:.0f} s, {untrained:.1f} % untrained ({said})"


def main(arguments: list[str] | None = None) -> int:
    """Train RetinaNet on a LaViT and state its AP50 on made pictures."""
    return run_seeds("python -m examples.detection", main.__doc__, arguments, run)


if __name__ == "__main__":
    sys.exit(main())
