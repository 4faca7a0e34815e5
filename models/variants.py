"""The published sizes by name, and the factory."""

import dataclasses
import difflib
from typing import Any

from models.config import Grid, LaViTConfig
from models.lavit import LaViT

# placeholder geometry until the search is done
_SIZES: dict[str, dict[str, Any]] = {
    "micro": {
        "patch_size": 2,
        "widths": (32, 64, 96, 160),
        "depths": (1, 2, 3, 2),
        "vanilla_blocks": (1, 1, 1, 1),
        "heads": (1, 2, 3, 5),
        "reduction_ratios": (4, 2, 1, 1),
        "mlp_ratios": (3.0, 3.0, 3.0, 3.0),
        "image_size": (32, 32),
    },
}


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
    known = [field.name for field in dataclasses.fields(LaViTConfig) if field.name != "name"]
    for override in overrides:
        if override not in known:
            raise ValueError(f"no field of a model is called {override!r}; {_near(override, known)}")
    size = _SIZES[name.removeprefix("lavit_").removesuffix("_vanilla")]
    twin = {"vanilla_blocks": size["depths"], "attention_residual": False} if name.endswith("_vanilla") else {}
    chosen = {key: tuple(v) if isinstance(v, list) else v for key, v in overrides.items()}
    if name.endswith("_vanilla") and "depths" in chosen:
        twin["vanilla_blocks"] = chosen["depths"]
    if image_size is not None:
        chosen["image_size"] = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    fields: dict[str, Any] = {"name": name, "num_classes": num_classes} | size | twin | chosen
    return LaViTConfig(**fields)


def create_model(
    name: str, num_classes: int = 1000, image_size: int | Grid | None = None, **overrides: Any
) -> LaViT:
    """Build a network by name, freshly initialised.

    Args:
        name: one of `list_models()`. `NAME_vanilla` is the same trunk with Vanilla Attention only and no attention
            residual, so that every claim can be compared.
        num_classes: outputs of the classifier.
        image_size: native side, or (height, width), in pixels; None: the size the name stands for (224; 32 for micro).
        **overrides: fields of `LaViTConfig`, in place of the size's own.

    Raises:
        ValueError: an unknown name or override (the near ones are listed), or a field that makes no sense (named).
    """
    return LaViT(model_config(name, num_classes, image_size, **overrides))


def _near(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"near it: {', '.join(near)}" if near else f"known: {', '.join(known)}"
