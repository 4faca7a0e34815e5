"""The published sizes by name, and the factory."""

import dataclasses
import difflib
from typing import Any

from .config import Grid, LaViTConfig, without_removed_fields
from .lavit import LaViT

# This project's geometry, the paper's totals: widths and depths were never published. One family: 64 channels a head,
# MLP ratios and spatial reduction as PVT's, and Less Attention where it saves multiplications, from the third block of
# stage 3 and the second of stage 4 on. How it was chosen, against which alternatives: see docs/model.md.
_TRUNK = {"mlp_ratios": (8.0, 8.0, 4.0, 4.0), "reduction_ratios": (8, 4, 2, 1)}
_SIZES: dict[str, dict[str, Any]] = {
    # For the demo: small scans on a CPU in seconds, with Less Attention in stages 1 to 3.
    "micro": {
        "image_size": (32, 32),
        "widths": (64, 96, 128, 160),
        "depths": (2, 2, 2, 1),
        "vanilla_blocks": (1, 1, 1, 1),
        "heads": (2, 3, 4, 5),
        "mlp_ratios": (2.0, 2.0, 2.0, 2.0),
        "reduction_ratios": (2, 1, 1, 1),
    },
    "tiny": _TRUNK | {
        "widths": (64, 128, 256, 384),
        "depths": (1, 2, 3, 3),
        "vanilla_blocks": (1, 2, 2, 1),
        "heads": (1, 2, 4, 6),
    },
    "small": _TRUNK | {
        "widths": (64, 192, 384, 576),
        "depths": (1, 2, 4, 2),
        "vanilla_blocks": (1, 2, 2, 1),
        "heads": (1, 3, 6, 9),
    },
    "base": _TRUNK | {
        "widths": (64, 192, 384, 576),
        "depths": (2, 3, 10, 3),
        "vanilla_blocks": (2, 3, 2, 1),
        "heads": (1, 3, 6, 9),
    },
    "large": _TRUNK | {
        "widths": (128, 384, 768, 1152),
        "depths": (2, 4, 14, 3),
        "vanilla_blocks": (2, 4, 2, 1),
        "heads": (2, 6, 12, 18),
    },
    "huge": _TRUNK | {
        "widths": (256, 768, 1536, 2304),
        "depths": (2, 4, 20, 3),
        "vanilla_blocks": (2, 4, 2, 1),
        "heads": (4, 12, 24, 36),
    },
}  # fmt: skip


def list_models() -> list[str]:
    """Names that `create_model` knows, smallest first; each `_vanilla` one follows the network it is the twin of."""
    return [name for size in _SIZES for name in (f"lavit_{size}", f"lavit_{size}_vanilla")]


def model_config(
    name: str, num_classes: int = 1000, image_size: int | Grid | None = None, **overrides: Any
) -> LaViTConfig:
    """The architecture that `create_model` builds for the same arguments."""
    names = list_models()
    if name not in names:
        raise ValueError(f"no model is called {name!r}; {_near(name, names)}")
    overrides = without_removed_fields(overrides)
    known = [field.name for field in dataclasses.fields(LaViTConfig) if field.name != "name"]
    for override in overrides:
        if override not in known:
            raise ValueError(f"no field of a model is called {override!r}; {_near(override, known)}")
    size = _SIZES[name.removeprefix("lavit_").removesuffix("_vanilla")]
    twin = {"vanilla_blocks": size["depths"], "attention_residual": False} if name.endswith("_vanilla") else {}
    if image_size is not None:
        overrides["image_size"] = (image_size, image_size) if isinstance(image_size, int) else image_size
    chosen = {key: tuple(v) if isinstance(v, list) else v for key, v in overrides.items()}
    if name.endswith("_vanilla") and "depths" in chosen:
        twin["vanilla_blocks"] = chosen["depths"]
    fields: dict[str, Any] = {"name": name, "num_classes": num_classes} | size | twin | chosen
    return LaViTConfig(**fields)


def create_model(name: str, num_classes: int = 1000, image_size: int | Grid | None = None, **overrides: Any) -> LaViT:
    """Build a network by name, freshly initialized.

    Args:
        name: one of `list_models()`. `NAME_vanilla` is the same trunk with Vanilla Attention only and no attention
            residual, so that every claim can be compared.
        num_classes: outputs of the classifier.
        image_size: native side, or (height, width), in pixels; None: the size of the variant (224; 32 for micro).
        **overrides: fields of `LaViTConfig`, in place of the size's own.

    Raises:
        ValueError: an unknown name or override (the near ones are listed), or a field that makes no sense (named).
    """
    return LaViT(model_config(name, num_classes, image_size, **overrides))


def _near(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"near it: {', '.join(near)}" if near else f"known: {', '.join(known)}"
