"""What the transformers library reads in a hand-off: code, image settings, and its own fields of ``config.json``."""

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

import models

if TYPE_CHECKING:
    from pretrain.handoff.folder import HandoffConfig

CODE = (
    "modeling_lavit.py", "attention.py", "block.py", "config.py", "diagonality.py", "lavit.py", "resample.py",
    "residual.py", "stage.py",
)  # fmt: skip
"""Files of ``models/`` that are copied: the first, which transformers imports, and all that it imports."""
PREPROCESSOR = "preprocessor_config.json"
FIELDS = ("model_type", "architectures", "auto_map", "id2label", "label2id")
"""Fields of ``config.json`` that are there for transformers alone."""


def files(config: "HandoffConfig") -> dict[str, bytes]:
    """Files that are written beside weights, config and card: name to content. The code is that of a LaViT only."""
    code = () if "factory" in config.architecture else CODE
    written = {name: (Path(models.__file__).parent / name).read_bytes() for name in code}
    height, width = config.input.size
    if height == width:  # no image processor of the library covers a rectangle and crops its center
        written[PREPROCESSOR] = (json.dumps(_preprocessor(config), indent=2) + "\n").encode()
    return written


def fields(config: "HandoffConfig") -> dict[str, Any]:
    """The values of ``FIELDS``, for a LaViT. A name that several classes share is followed by its id, to be unique."""
    if "factory" in config.architecture:
        return {}
    module, count = Path(CODE[0]).stem, Counter(config.class_names)
    ids = config.class_ids or [str(label) for label in range(config.num_classes)]
    names = [
        name if count[name] == 1 else f"{name} ({class_id})"
        for name, class_id in zip(config.class_names, ids, strict=True)
    ]
    return {
        "model_type": "lavit",
        "architectures": ["LaViTForImageClassification"],
        "auto_map": {
            "AutoConfig": f"{module}.LaViTPretrainedConfig",
            "AutoModelForImageClassification": f"{module}.LaViTForImageClassification",
        },
        "id2label": {str(label): name for label, name in enumerate(names)},
        "label2id": {name: label for label, name in enumerate(names)},
    }


def _preprocessor(config: "HandoffConfig") -> dict[str, Any]:
    """The evaluation transform in the terms of the library's image processor for a resized short side and a crop."""
    side = config.input.size[0]
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": int(side / config.input.eval_crop_ratio + 1e-6)},
        "resample": Image.Resampling[config.input.interpolation.upper()].value,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.input.mean),
        "image_std": list(config.input.std),
    }
