"""Every operation of RandAugment and TrivialAugment against Pillow, at two strengths and in both directions.

Differences are in steps of 8 bits. What a picture's border becomes is left out where Pillow and DALI treat it
differently: DALI blends it with the gray that comes in, Pillow cuts it off; and Pillow does not sharpen the last row.
"""

import itertools
import warnings

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from scipy.stats import chisquare
from sklearn.datasets import load_digits, load_sample_images

from data_pipeline import auto_augment
from data_pipeline.draws import Draws
from data_pipeline.transforms import AugmentConfig, RandAugmentConfig
from tests.data_pipeline.images import trained

SIZE = (120, 90)
RAND = AugmentConfig(rand_augment=RandAugmentConfig(operations=1))
TRIVIAL = AugmentConfig(trivial_augment=True)
SUITES = {"rand": (RAND, auto_augment.RAND_AUGMENT), "trivial": (TRIVIAL, auto_augment.TRIVIAL_AUGMENT)}
OPERATIONS = [(suite, op.name) for suite, (_, ops) in SUITES.items() for op in ops]
STRENGTHS = (14, 27)  # of 0..30


def pictures() -> list[Image.Image]:
    scan = (load_digits().images[5] * (255 / 16)).round().astype(np.uint8)
    found = [Image.fromarray(array) for array in (*load_sample_images().images, scan)]
    return [image.resize(SIZE, Image.Resampling.BICUBIC).convert("RGB") for image in found]


def opencvs_equalize(image: Image.Image) -> Image.Image:
    """Equalize as OpenCV does, whose formula DALI follows; Pillow's is 2 to 5 steps away on the photographs."""
    out = []
    for channel in np.asarray(image).transpose(2, 0, 1):
        total = np.bincount(channel.reshape(-1), minlength=256).cumsum()
        lowest = total[channel.min()]
        table = np.rint((total - lowest) * 255 / (channel.size - lowest)).clip(0, 255)
        out.append(table[channel].astype(np.uint8))
    return Image.fromarray(np.stack(out, axis=-1))


def solarize_add(image: Image.Image, addition: int) -> Image.Image:
    """As timm: what is darker than 128 is raised."""
    return image.point([value + addition if value < 128 else value for value in range(256)] * 3)


def warped(image: Image.Image, matrix: tuple[float, ...], fill: int) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=(fill,) * 3)


def pillows(suite: str, name: str, image: Image.Image, strength: int, sign: int, *, fill: int = 128) -> Image.Image:
    """What Pillow makes of a picture; ranges are those of timm for "rand", of torchvision for "trivial"."""
    m, direction, rand = strength / 30, 1 - 2 * sign, suite == "rand"
    shear = direction * m * (0.3 if rand else 0.99)
    shift = [direction * m * (0.45 * side if rand else 32) for side in image.size]
    factor = 1 + direction * (0.9 * m if rand else 0.01 + 0.98 * m)
    bits = max(1, round(4 - 4 * m)) if rand else round(8 - 6 * m)
    return {
        "rotate": lambda: image.rotate(
            direction * m * (30 if rand else 135), Image.Resampling.BILINEAR, fillcolor=(fill,) * 3
        ),
        "shear_x": lambda: warped(image, (1, -shear, 0, 0, 1, 0), fill),
        "shear_y": lambda: warped(image, (1, 0, 0, -shear, 1, 0), fill),
        "translate_x": lambda: warped(image, (1, 0, -shift[0], 0, 1, 0), fill),
        "translate_y": lambda: warped(image, (1, 0, 0, 0, 1, -shift[1]), fill),
        "brightness": lambda: ImageEnhance.Brightness(image).enhance(factor),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(factor),
        "color": lambda: ImageEnhance.Color(image).enhance(factor),
        "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(factor),
        "posterize": lambda: ImageOps.posterize(image, bits),
        "solarize": lambda: ImageOps.solarize(image, 256 - 256 * m),
        "solarize_add": lambda: solarize_add(image, int(110 * m)),
        "auto_contrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: opencvs_equalize(image),
        "invert": lambda: ImageOps.invert(image),
        "identity": lambda: image,
    }[name]()


MOVES = {"rotate", "shear_x", "shear_y", "translate_x", "translate_y"}


def inside(suite: str, name: str, size: tuple[int, int], strength: int, sign: int) -> np.ndarray:
    """Where the two are to agree: (h, w) of bool."""
    mask = Image.new("RGB", size, "white")
    if name in MOVES:
        mask = pillows(suite, name, mask, strength, sign, fill=0)
        # Two pixels from what comes in, also where that is just outside.
        mask = ImageOps.expand(ImageOps.crop(mask.filter(ImageFilter.MinFilter(5)), 2), 2, "black")
    elif name == "sharpness":
        mask = ImageOps.expand(ImageOps.crop(mask, 1), 1, "black")
    return np.asarray(mask)[..., 0] == 255


def dalis(config: AugmentConfig, given: list[np.ndarray]) -> np.ndarray:
    """What DALI makes of pictures (n, h, w, 3) with operations, strengths and signs, each (n, 1)."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.pipeline import do_not_convert

    source = do_not_convert(lambda: given)

    @pipeline_def(
        batch_size=len(given[0]), num_threads=1, device_id=None, enable_conditionals=True, prefetch_queue_depth=1
    )
    def graph():
        pixels, operation, strength, sign = fn.external_source(
            source, num_outputs=4, ndim=[3, 1, 1, 1], dtype=[types.UINT8, *[types.INT32] * 3], layout=["HWC", *[""] * 3]
        )
        inputs = {"operation": operation, "strength": strength, "sign": sign}
        return auto_augment.apply(pixels, config, inputs, SIZE[::-1])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        (out,) = graph().run()
    return np.array(out.as_tensor()).astype(np.float32)


@pytest.fixture(scope="module")
def results() -> dict[tuple[str, str], list[tuple[Image.Image, int, int, np.ndarray]]]:
    """By policy and operation, each case: (picture, strength, sign, what DALI makes of it)."""
    images, found = pictures(), {}
    for suite, (config, ops) in SUITES.items():
        cases = np.array(list(itertools.product(range(len(ops)), range(len(images)), STRENGTHS, (0, 1))), np.int32)
        given = [np.stack([np.asarray(images[i]) for i in cases[:, 1]])]
        given += [cases[:, [column]].copy() for column in (0, 2, 3)]
        for (op, i, strength, sign), pixels in zip(cases.tolist(), dalis(config, given), strict=True):
            found.setdefault((suite, ops[op].name), []).append((images[i], strength, sign, pixels))
    return found


# The largest difference of any value, where it is not one step of rounding.
LARGEST = {"color": 2} | dict.fromkeys(("invert", "posterize", "solarize", "solarize_add", "identity", "equalize"), 0)


@pytest.mark.parametrize(("suite", "name"), OPERATIONS)
def test_each_operation_is_pillows_but_for_equalize_which_is_opencvs(results, suite, name):
    changes = []
    for image, strength, sign, got in results[suite, name]:
        mask = inside(suite, name, image.size, strength, sign)
        expected = np.asarray(pillows(suite, name, image, strength, sign), np.float32)
        assert mask.mean() > 0.3
        assert np.abs(got - expected)[mask].max() <= LARGEST.get(name, 1)
        changes.append(np.abs(got - np.asarray(image)).mean())
    assert (max(changes) > 1) == (name != "identity")


def test_what_comes_in_from_outside_is_gray(results):
    for suite, name in (("rand", "translate_x"), ("trivial", "translate_y"), ("trivial", "shear_x")):
        for image, strength, sign, got in results[suite, name]:
            outside = np.asarray(pillows(suite, name, Image.new("RGB", image.size), strength, sign, fill=255))[..., 0]
            # Two pixels from the picture.
            outside = np.asarray(Image.fromarray(outside).filter(ImageFilter.MinFilter(5))) == 255
            assert outside.sum() > 100
            assert (got[outside] == 128).all()


@pytest.mark.parametrize("suite", SUITES)
def test_training_applies_the_operations_that_were_drawn(photos, suite):
    config = AugmentConfig(rand_augment=RandAugmentConfig(probability=1)) if suite == "rand" else TRIVIAL
    got, whole = trained(photos, config), trained(photos, AugmentConfig())
    draws = Draws(5, np.zeros(len(got), np.int64), np.arange(len(got)))
    if config.rand_augment is not None:
        drawn = auto_augment.draw_rand_augment(config.rand_augment, draws.uniform(18, 10))
    else:
        drawn = auto_augment.draw_trivial_augment(draws.uniform(18, 3))
    for i in got:
        image = Image.fromarray(whole[i].round().clip(0, 255).astype(np.uint8))
        mask = np.ones((96, 96), bool)
        for slot in range(drawn["operation"].shape[1]):
            operation, strength, sign = (int(drawn[key][i, slot]) for key in ("operation", "strength", "sign"))
            name = SUITES[suite][1][operation].name
            mask &= inside(suite, name, image.size, strength, sign)
            image = pillows(suite, name, image, strength, sign)
        # The second operation meets the roundings of the first: next to a threshold a value may flip.
        assert mask.mean() > 0.4
        assert np.abs(got[i] - np.asarray(image))[mask].mean() < (1.2 if suite == "rand" else 0.6)


def test_rand_augments_draws_have_the_meaning_of_timms():
    u = Draws(3, np.zeros(20_000, np.int64), np.arange(20_000)).uniform(18, 10)
    drawn = auto_augment.draw_rand_augment(RandAugmentConfig(), u)
    identity = len(auto_augment.RAND_AUGMENT) - 1
    assert abs((drawn["operation"] == identity).mean() - 0.5) < 0.01
    applied = np.bincount(drawn["operation"][drawn["operation"] != identity], minlength=identity)
    assert applied.min() > 0.9 * applied.mean()
    magnitude = drawn["strength"] / 30 * 10
    assert abs(magnitude.mean() - 9) < 0.05
    assert abs(magnitude.std() - 0.5) < 0.08
    assert abs(drawn["sign"].mean() - 0.5) < 0.01


def test_trivial_augments_draws_are_uniform_over_operations_strengths_and_directions():
    drawn = auto_augment.draw_trivial_augment(Draws(3, np.zeros(31_000, np.int64), np.arange(31_000)).uniform(18, 3))
    for key, count in (("operation", 14), ("strength", 31), ("sign", 2)):
        assert drawn[key].shape == (31_000, 1)
        assert chisquare(np.bincount(drawn[key][:, 0], minlength=count)).pvalue > 0.01
        assert len(np.unique(drawn[key])) == count
