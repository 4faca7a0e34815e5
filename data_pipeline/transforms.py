"""What is done to images: the `data:` and `mixing:` sections of a recipe.

Lengths are in pixels, angles in degrees, fractions between 0 and 1.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from data_pipeline.store import CacheConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if not 0 < pair[0] <= pair[1]:
        raise ValueError(f"must be two positive numbers, the smaller first, but is {pair}")
    return pair


Range = Annotated[tuple[float, float], AfterValidator(_ordered)]
_REMOVED = {"device_memory_padding", "preallocate_hint"}
"""Fields of older runs' recipes that are ignored, as they changed no pixel."""


def as_location(value: object) -> object:
    """A dataset's URL stays a string, all else becomes a path."""
    return value if isinstance(value, str) and "://" in value else Path(str(value))


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _without_removed(cls, fields: Any) -> Any:
        return {name: fields[name] for name in fields if name not in _REMOVED} if isinstance(fields, dict) else fields


class RandomResizedCropConfig(_Config):
    """Cut out a random box and resize it to the image size (Szegedy et al. 2014, with torchvision's rule)."""

    scale: Range = (0.08, 1.0)
    """The box's share of the image's area, drawn uniformly."""
    ratio: Range = (3 / 4, 4 / 3)
    """The box's width over its height, drawn uniformly in the logarithm."""


class AffineConfig(_Config):
    """A small random rotation, shift and zoom about the center of the resized image; uncovered areas are black."""

    degrees: float = Field(0.0, ge=0, le=180)
    """Rotation, drawn uniformly from [-degrees, degrees]."""
    translate: Fraction = 0.0
    """Shift along each axis, drawn uniformly from [-translate, translate] times the image's size."""
    scale: Range = (1.0, 1.0)
    """Zoom, drawn uniformly."""


class RandAugmentConfig(_Config):
    """RandAugment, with the meaning of timm's `rand-m9-mstd0.5-inc1`."""

    operations: int = Field(2, ge=1, le=4)
    """Operations drawn for each image, one after the other."""
    magnitude: float = Field(9.0, ge=0, le=10)
    """Strength: 0 changes nothing (nearly nothing for some operations), 10 is the strongest."""
    magnitude_std: float = Field(0.5, ge=0)
    """Standard deviation of the magnitude, which differs from operation to operation."""
    probability: Fraction = 0.5
    """Each operation is applied with this probability."""


class ColorJitterConfig(_Config):
    """Random brightness, contrast, saturation and hue; DALI applies them in this fixed order, in one pass."""

    brightness: Fraction = 0.0
    """A factor from [1 - brightness, 1 + brightness]."""
    contrast: Fraction = 0.0
    """A factor from [1 - contrast, 1 + contrast], about mid-gray."""
    saturation: Fraction = 0.0
    """A factor from [1 - saturation, 1 + saturation]."""
    hue: float = Field(0.0, ge=0, le=0.5)
    """A rotation of the color circle from [-hue, hue]; 0.5 is half of it."""


class RandomErasingConfig(_Config):
    """Random erasing (Zhong et al. 2017): a box of the normalized image becomes 0, the mean color."""

    probability: Fraction = 0.25
    """Share of the images in which a box is erased."""
    scale: Range = (0.02, 1 / 3)
    """The box's share of the area, drawn uniformly."""
    ratio: Range = (0.3, 1 / 0.3)
    """The box's height over its width, drawn uniformly in the logarithm."""


class AugmentConfig(_Config):
    """What makes a training image differ from epoch to epoch. Each part is off where it is not named."""

    random_resized_crop: RandomResizedCropConfig | None = None
    """Left out, the whole image is resized."""
    horizontal_flip: Fraction = 0.0
    """Probability of mirroring left to right."""
    affine: AffineConfig | None = None
    """Meant for small images such as digits."""
    rand_augment: RandAugmentConfig | None = None
    """At most one of this and trivial_augment."""
    trivial_augment: bool = False
    """One operation of any strength for each image, as torchvision's TrivialAugmentWide."""
    color_jitter: ColorJitterConfig | None = None
    """Applied before RandAugment or TrivialAugment."""
    random_erasing: RandomErasingConfig | None = None
    """Applied last."""

    @model_validator(mode="after")
    def _one_policy(self) -> "AugmentConfig":
        if self.rand_augment is not None and self.trivial_augment:
            raise ValueError("rand_augment and trivial_augment exclude each other; choose one")
        return self


class InputConfig(_Config):
    """The way from shards on disk to a normalized batch on the device."""

    path: Annotated[Path | str, BeforeValidator(as_location)]
    """The dataset's folder, as written by `python -m data_pipeline.build`; or a URL that fsspec knows."""
    cache: CacheConfig | None = None
    """Needed for a URL: where its files are kept on local disk."""
    train_split: str = "train"
    """The split that is trained on."""
    val_split: str = "val"
    """The split that is evaluated on."""
    image_size: int | tuple[int, int] = 224
    """Side of the square that the model sees, or (height, width)."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted from each channel; red, green, blue in 0..1."""
    std: tuple[Positive, Positive, Positive] = IMAGENET_STD
    """Each channel is divided by it after the mean is subtracted."""
    interpolation: Literal["bilinear", "bicubic", "lanczos"] = "bicubic"
    """How training and evaluation resize; always with antialiasing, as Pillow does it."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of the images' values."""
    augment: AugmentConfig = AugmentConfig()
    """Augmentation of the training split."""
    eval_crop_ratio: float = Field(0.875, gt=0, le=1)
    """Evaluation resizes the short side to image size / this ratio, then crops the center; 0.875 is 256 -> 224."""
    shuffle_window: int = Field(16, ge=1)
    """Samples are shuffled within this many shards at a time; one shard is read almost sequentially, more mix
    better."""
    lanes: int = Field(1, ge=1)
    """Cut the order into this many lanes, each with its own part of the shards, so that a node reads only the shards of
    the lanes it serves. Part of the order: a run keeps its number of lanes. Must divide the global batch."""
    threads: int | None = Field(None, ge=1)
    """DALI's CPU threads per rank; by default this process's cores divided by the ranks on the machine."""
    prefetch: int = Field(2, ge=1)
    """Micro-batches that are prepared ahead."""
    hw_decoder_load: float = Field(0.0, ge=0, le=1)
    """Share of a batch that a GPU's JPEG engine decodes. Two decoders need not agree to the last bit, and which one an
    image gets depends on its batch: between 0 and 1 a resumed run may see other pixels. DALI's default is 0.65."""
    max_bad_fraction: Fraction = 0.001
    """Bad samples are replaced and reported; when a rank has met more than this share of the split, it stops."""

    @model_validator(mode="after")
    def _positive_size(self) -> "InputConfig":
        if min(self.size) < 1:
            raise ValueError(f"image_size must be positive, but is {self.image_size}")
        return self

    @property
    def size(self) -> tuple[int, int]:
        """Height and width that the model sees, in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size


class MixingConfig(_Config):
    """How the images of a batch are mixed and how their labels become targets."""

    mixup: float = Field(0.0, ge=0)
    """Alpha of the Beta distribution of the share that an image keeps; 0 switches mixup off."""
    cutmix: float = Field(0.0, ge=0)
    """Alpha of the Beta distribution of the area that an image keeps; 0 switches CutMix off."""
    switch_probability: float = Field(0.5, ge=0, le=1)
    """Share of CutMix where both are on."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Spread over all classes in every target."""

    @property
    def in_pairs(self) -> bool:
        """Whether images are mixed with their neighbors, so that micro-batches must be even."""
        return bool(self.mixup or self.cutmix)
