"""Hand-offs of small networks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipeline.transforms import IMAGENET_MEAN, IMAGENET_STD
from models import LaViT
from pretrain.handoff.folder import write_handoff

SMALL = {"depths": [1, 1, 2, 1], "widths": [16, 32, 32, 32], "heads": [1, 2, 2, 2]}


def hand_off(folder: Path, model: LaViT, card: Callable[[dict[str, Any]], str] = str, **fields: Any) -> Path:
    """Write the hand-off of a model; ``fields`` take the place of those of its config, ``card`` is called with all."""
    classes, given = model.config.num_classes, fields.pop("input", {})
    content = {
        "architecture": model.config.to_dict(), "num_classes": classes,
        "class_names": [chr(ord("a") + number) for number in range(classes)],
        "input": {"image_size": model.config.image_size, "mean": IMAGENET_MEAN, "std": IMAGENET_STD,
                  "interpolation": "bicubic", "eval_crop_ratio": 0.875, **given}, "weights": "raw",
        "dataset": {"name": "x", "fingerprint": "f", "samples": 100}, "recipe": {"name": "r"},
        "metrics": {"top1": 50.0, "top5": 100.0, "loss": 1.25}, "samples_seen": 1000,
    } | fields  # fmt: skip
    write_handoff(folder, model.state_dict(), content, card(content))
    return folder
