"""What a LaViT is made of: one frozen, checked, JSON-able description."""

import dataclasses
import functools
import logging
import math
from typing import Any, Literal

STAGES = 4
Grid = tuple[int, int]
"""(height, width) of a grid of tokens, or of an image in pixels."""
REMOVED_FIELDS = ("attention_kernel",)
"""Fields that recipes and hand-offs of earlier versions may name and that changed no weight: accepted and ignored."""


@dataclasses.dataclass(frozen=True)
class LaViTConfig:
    """The complete architecture: `LaViT(LaViTConfig.from_dict(config.to_dict()))` builds the same network.

    The paper published names and totals, but neither widths nor depths: every default here is this project's choice.

    Raises:
        ValueError: a field makes no sense; the message names it.
    """

    name: str = "lavit"
    """What `create_model` calls it; kept for the hand-off."""
    num_classes: int = 1000
    """Outputs of the classifier."""
    image_size: Grid = (224, 224)
    """Native (height, width) in pixels: the size for which Psi, Theta and the position embeddings are stored."""
    in_channels: int = 3
    patch_size: int = 4
    """Side in pixels of one token of stage 1; stages 2 to 4 halve the grid each."""
    widths: tuple[int, ...] = (64, 128, 320, 512)
    """Channels C of each stage."""
    depths: tuple[int, ...] = (2, 2, 2, 2)
    """Blocks of each stage."""
    vanilla_blocks: tuple[int, ...] = (2, 2, 2, 2)
    """How many of each stage's blocks, counted from its first, are Vanilla Attention; the rest are Less Attention."""
    heads: tuple[int, ...] = (1, 2, 5, 8)
    mlp_ratios: tuple[float, ...] = (4.0, 4.0, 4.0, 4.0)
    """Hidden width of the MLP over C."""
    reduction_ratios: tuple[int, ...] = (8, 4, 2, 1)
    """Spatial reduction: one key represents a square of this many tokens a side (1: every token is a key)."""
    learned_maps: bool = True
    """Whether Less Attention blocks have Psi and Theta. Without them they repeat the scores of the block before, as in
    "Leveraging redundancy in attention with Reuse Transformers" (arXiv 2110.06821)."""
    attention_residual: bool = True
    """Whether the last scores of a stage are added, pooled, to the first scores of the next."""
    pool: Literal["class_attention", "mean"] = "class_attention"
    """How the last stage's tokens become one vector. The class token never enters a score matrix (our choice)."""
    drop_path: float = 0.0
    """Stochastic depth: the rate of the last block; it grows linearly from 0 at the first."""
    norm: Literal["torch", "apex"] = "torch"
    """torch's LayerNorm, or the FusedLayerNorm of NVIDIA's apex."""

    def __post_init__(self) -> None:
        """Refuse what makes no sense, naming the field."""
        _require(_positive_ints(self.image_size, 2), f"image_size: (height, width) in pixels, got {self.image_size}")
        for field in ("num_classes", "in_channels", "patch_size"):
            value = getattr(self, field)
            _require(_positive_ints((value,), 1), f"{field}: a positive integer, got {value!r}")
        for field in ("widths", "depths", "vanilla_blocks", "heads", "reduction_ratios"):
            value = getattr(self, field)
            _require(_positive_ints(value, STAGES), f"{field}: {STAGES} positive integers, one a stage, got {value!r}")
        ratios = self.mlp_ratios
        _require(
            isinstance(ratios, tuple) and len(ratios) == STAGES and all(_is_number(r) and r > 0 for r in ratios),
            f"mlp_ratios: {STAGES} positive numbers, one a stage, got {ratios!r}",
        )
        for stage in range(STAGES):
            vanilla, depth = self.vanilla_blocks[stage], self.depths[stage]
            _require(
                vanilla <= depth,
                f"vanilla_blocks: stage {stage + 1} has {vanilla} of them, but depths gives it {depth} blocks",
            )
            width, heads = self.widths[stage], self.heads[stage]
            _require(width % heads == 0, f"heads: {heads} heads cannot share stage {stage + 1}'s width of {width}")
            hidden = round(width * ratios[stage])
            _require(hidden > 0, f"mlp_ratios: {ratios[stage]} of stage {stage + 1}'s width of {width} is nothing")
        _require(self.pool in {"class_attention", "mean"}, f"pool: 'class_attention' or 'mean', got {self.pool!r}")
        _require(self.norm in {"torch", "apex"}, f"norm: 'torch' or 'apex', got {self.norm!r}")
        _require(
            _is_number(self.drop_path) and 0 <= self.drop_path < 1,
            f"drop_path: at least 0 and below 1, got {self.drop_path!r}",
        )
        for field in ("learned_maps", "attention_residual"):
            value = getattr(self, field)
            _require(isinstance(value, bool), f"{field}: true or false, got {value!r}")
        for stage in range(STAGES - 1) if self.attention_residual else ():
            finer, coarser = (self.key_side(s) for s in (stage, stage + 1))
            _require(
                coarser % finer == 0,
                f"reduction_ratios: a key of stage {stage + 2} covers {coarser} pixels a side, which is no multiple of "
                f"stage {stage + 1}'s {finer}; the attention residual pools whole keys",
            )
        self.grids(self.image_size)

    @property
    def stride(self) -> int:
        """Pixels: the side of every input image must be a multiple of it, so that each grid divides evenly."""
        return math.lcm(*(self.key_side(stage) for stage in range(STAGES)), self.patch_size * 2 ** (STAGES - 1))

    def key_side(self, stage: int) -> int:
        """Side in pixels of the square that one key token of `stage` (counted from 0) represents."""
        return self.patch_size * 2**stage * self.reduction_ratios[stage]

    def grids(self, image_size: Grid) -> list[tuple[Grid, Grid]]:
        """(query grid, key grid) of each stage for images of `image_size` pixels.

        Raises:
            ValueError: a side is not a multiple of `stride`.
        """
        _require(
            image_size[0] % self.stride == 0 and image_size[1] % self.stride == 0,
            f"image_size: {image_size[0]} x {image_size[1]} pixels; each side must be a multiple of {self.stride}",
        )
        sides = [(self.patch_size * 2**stage, self.key_side(stage)) for stage in range(STAGES)]
        return [
            ((image_size[0] // query, image_size[1] // query), (image_size[0] // key, image_size[1] // key))
            for query, key in sides
        ]

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of JSON types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "LaViTConfig":
        """The inverse of `to_dict`; lists become tuples, and `REMOVED_FIELDS` are dropped.

        Raises:
            ValueError: an unknown field, or one that makes no sense.
        """
        fields = without_removed_fields(fields)
        unknown = sorted(set(fields) - {field.name for field in dataclasses.fields(cls)})
        _require(not unknown, f"LaViTConfig has no field {', '.join(unknown)}")
        typed: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return cls(**typed)


def without_removed_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields without `REMOVED_FIELDS`; a warning is logged once per process and field."""
    for name in fields.keys() & REMOVED_FIELDS:
        _log_removed(name)
    return {name: value for name, value in fields.items() if name not in REMOVED_FIELDS}


@functools.cache
def _log_removed(name: str) -> None:
    logging.getLogger(__name__).warning("model: the field %s was removed and is ignored: it changed no weight", name)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _positive_ints(value: object, count: int) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == count
        and all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in value)
    )
