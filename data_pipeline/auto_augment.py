"""RandAugment (Cubuk et al. 2019) and TrivialAugment (Müller and Hutter 2021) with DALI's operations and our draws.

DALI's own `rand_augment` draws inside the graph, so an image would depend on its neighbors; here which operation, how
strongly and in which direction are inputs. RandAugment's operations and strengths are those of timm's
`rand-m9-mstd0.5-inc1` family, whose magnitude runs from 0 to 10 and which applies each operation with probability 0.5;
TrivialAugment's are those of torchvision's TrivialAugmentWide. Strength is rounded to one of 31 steps.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali.auto_aug import augmentations as ops
from nvidia.dali.auto_aug.core import select, signed_bin
from nvidia.dali.auto_aug.trivial_augment import get_trivial_augment_wide_suite

from data_pipeline.transforms import AugmentConfig, RandAugmentConfig

STEPS = 31
_FILL = 128  # gray, where an image has been moved away
_MAX_MAGNITUDE = 10

RAND_AUGMENT = [
    ops.auto_contrast,
    ops.equalize,
    ops.invert,
    ops.rotate.augmentation((0, 30), True),
    ops.posterize.augmentation((4, 0), False, ops.poster_mask_uint8),
    ops.solarize.augmentation((256, 0)),
    ops.solarize_add.augmentation((0, 110)),
    ops.color.augmentation((0, 0.9), True, ops.shift_enhance_range),
    ops.contrast.augmentation((0, 0.9), True, ops.shift_enhance_range),
    ops.brightness.augmentation((0, 0.9), True, ops.shift_enhance_range),
    ops.sharpness.augmentation((0, 0.9), True, ops.sharpness_kernel),
    ops.shear_x.augmentation((0, 0.3), True),
    ops.shear_y.augmentation((0, 0.3), True),
    ops.translate_x.augmentation((0, 0.45), True),
    ops.translate_y.augmentation((0, 0.45), True),
    ops.identity,  # for the half of the images that an operation is not applied to
]
TRIVIAL_AUGMENT = get_trivial_augment_wide_suite(max_translate_abs=32)


def draw_rand_augment(config: RandAugmentConfig, u: NDArray[np.float64]) -> dict[str, NDArray[np.int32]]:
    """Turn uniform numbers (n, 5 * operations) into the graph's inputs, each (n, operations)."""
    chosen, applied, sign, *gauss = np.split(u, 5, axis=1)
    operation = np.floor(chosen * (len(RAND_AUGMENT) - 1))
    # Box and Muller's normal numbers; 1 - u, because the logarithm of 0 is none.
    normal = np.sqrt(-2 * np.log(1 - gauss[0])) * np.cos(2 * np.pi * gauss[1])
    magnitude = np.clip(config.magnitude + config.magnitude_std * normal, 0, _MAX_MAGNITUDE)
    return {
        "operation": np.where(applied < config.probability, operation, len(RAND_AUGMENT) - 1).astype(np.int32),
        "strength": np.rint(magnitude / _MAX_MAGNITUDE * (STEPS - 1)).astype(np.int32),
        "sign": (sign < 0.5).astype(np.int32),
    }


def draw_trivial_augment(u: NDArray[np.float64]) -> dict[str, NDArray[np.int32]]:
    """Turn uniform numbers (n, 3) into the graph's inputs, each (n, 1)."""
    return {
        "operation": np.floor(u[:, :1] * len(TRIVIAL_AUGMENT)).astype(np.int32),
        "strength": np.floor(u[:, 1:2] * STEPS).astype(np.int32),
        "sign": (u[:, 2:] < 0.5).astype(np.int32),
    }


def apply(images: Any, config: AugmentConfig, inputs: dict[str, Any], size: tuple[int, int]) -> Any:
    """Apply the operations that were drawn; images are HWC uint8 of `size`."""
    suite = RAND_AUGMENT if config.rand_augment is not None else TRIVIAL_AUGMENT
    for slot in range(config.rand_augment.operations if config.rand_augment is not None else 1):
        arguments = {
            "data": images,
            "magnitude_bin": signed_bin(inputs["strength"][slot], random_sign=inputs["sign"][slot]),
            "num_magnitude_bins": STEPS,
            "fill_value": _FILL,
        }
        if config.rand_augment is not None:
            arguments["shape"] = size
        images = select(suite, inputs["operation"][slot], **arguments)
    return images
