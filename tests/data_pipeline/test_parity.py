"""Every step of the graph against Pillow on real photographs, within stated bounds.

Mean absolute differences are in steps of 8 bits. JPEG decoders differ by a rounding here and there, and resizing with
antialiasing rounds at other places: both stay below one step on average.
"""

import random

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy.stats import ks_2samp

from data_pipeline.draws import Draws, affine, color_jitter, random_erasing, random_resized_crop
from data_pipeline.transforms import (
    AffineConfig,
    AugmentConfig,
    ColorJitterConfig,
    InputConfig,
    RandomErasingConfig,
    RandomResizedCropConfig,
)
from tests.data_pipeline.datasets import evaluation
from tests.data_pipeline.images import PLAIN, difference, originals, trained

PILLOW = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@pytest.mark.parametrize("interpolation", PILLOW)
@pytest.mark.parametrize(("size", "ratio"), [(224, 0.875), (96, 1.0), ((128, 64), 0.9)])
def test_evaluation_is_pillows_resize_and_centre_crop(photos, interpolation, size, ratio):
    config = InputConfig(path=photos.path, image_size=size, eval_crop_ratio=ratio, interpolation=interpolation, **PLAIN)
    with evaluation(photos, config, batch_size=6) as loader:
        (batch,) = list(loader)
    h, w = config.size
    for row, image in enumerate(originals(photos)):
        target = (int(h / ratio + 1e-6), int(w / ratio + 1e-6))
        scale = max(target[0] / image.height, target[1] / image.width)
        resized = (max(int(image.width * scale + 1e-6), target[1]), max(int(image.height * scale + 1e-6), target[0]))
        whole = image.resize(resized, PILLOW[interpolation])
        left, top = round((resized[0] - w) / 2), round((resized[1] - h) / 2)
        expected = whole.crop((left, top, left + w, top + h))
        assert difference(batch.images[row].permute(1, 2, 0).numpy() * 255, expected) < 1.0


@pytest.mark.parametrize("interpolation", PILLOW)
def test_a_random_resized_crop_is_pillows_crop_and_resize(photos, interpolation):
    config = RandomResizedCropConfig()
    got = trained(photos, AugmentConfig(random_resized_crop=config), interpolation=interpolation)
    for i, image in enumerate(originals(photos)):
        draws = Draws(5, np.zeros(1, np.int64), np.array([i]))
        box = random_resized_crop(config, draws, np.array([image.width]), np.array([image.height]))
        (top, left), (height, width) = box["start"][0].tolist(), box["shape"][0].tolist()
        # torchvision crops first; so do we, in the decoder.
        expected = image.crop((left, top, left + width, top + height)).resize((96, 96), PILLOW[interpolation])
        assert difference(got[i], expected) < 1.0


def torchvisions_box(chance: random.Random, w: int, h: int) -> tuple[float, ...]:
    """Draw one box as the documentation of torchvision's RandomResizedCrop says; share, ratio, top, left."""
    for _ in range(10):
        area = w * h * chance.uniform(0.08, 1)
        ratio = np.exp(chance.uniform(np.log(3 / 4), np.log(4 / 3)))
        width, height = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < width <= w and 0 < height <= h:
            break
    else:
        raise AssertionError("this does not happen with a picture of 4:3")
    return height * width / (w * h), width / height, chance.randint(0, h - height), chance.randint(0, w - width)


def test_boxes_of_random_resized_crop_follow_torchvisions_rule():
    n = 20_000
    draws = Draws(1, np.zeros(n, np.int64), np.arange(n))
    box = random_resized_crop(RandomResizedCropConfig(), draws, np.full(n, 500), np.full(n, 375))
    (top, left), (height, width) = box["start"].T, box["shape"].T
    assert min(top.min(), left.min()) >= 0
    assert (top + height).max() <= 375
    assert (left + width).max() <= 500
    share = height * width / (500 * 375)
    expected = np.array([torchvisions_box(random.Random(i), 500, 375) for i in range(n // 4)])
    for ours, theirs in zip((share, width / height, top, left), expected.T, strict=True):
        assert ks_2samp(ours, theirs).pvalue > 0.01
    narrow = random_resized_crop(RandomResizedCropConfig(scale=(1, 1)), draws, np.full(n, 1000), np.full(n, 10))
    assert (narrow["shape"] == [10, 13]).all()  # nothing fits: as wide as the largest ratio allows, centred
    assert (narrow["start"] == [0, 493]).all()


def test_a_flip_is_pillows_mirror(photos):
    whole, flipped = trained(photos, AugmentConfig()), trained(photos, AugmentConfig(horizontal_flip=1.0))
    assert all(np.array_equal(flipped[i], whole[i][:, ::-1]) for i in whole)


def test_an_affine_turn_is_pillows_rotation_about_the_centre(photos):
    config = AffineConfig(degrees=30)
    got, whole = trained(photos, AugmentConfig(affine=config)), trained(photos, AugmentConfig())
    for i in got:
        matrix = affine(config, Draws(5, np.zeros(1, np.int64), np.array([i])), (96, 96))[0]
        # Pillow, too, maps pixel centres at +0.5 from the result to the source.
        source = Image.fromarray(whole[i].round().clip(0, 255).astype(np.uint8))
        data = tuple(matrix.reshape(-1).tolist())
        expected = source.transform((96, 96), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)
        inner = np.s_[20:76, 20:76]  # borders are blended with black by DALI and cut by Pillow
        assert difference(got[i][inner], np.asarray(expected)[inner]) < 1.0


def jittered(photos, **amounts) -> list[tuple[np.ndarray, np.ndarray, dict[str, float]]]:
    """Each photograph (result, source, what was drawn for it)."""
    config = ColorJitterConfig(**amounts)
    got, whole = trained(photos, AugmentConfig(color_jitter=config)), trained(photos, AugmentConfig())
    drawn = color_jitter(config, Draws(5, np.zeros(len(got), np.int64), np.arange(len(got))))
    return [(got[i], whole[i].round().clip(0, 255), {k: float(v[i]) for k, v in drawn.items()}) for i in sorted(got)]


@pytest.mark.parametrize("name", ["brightness", "saturation"])
def test_colour_jitter_is_pillows_enhancement(photos, name):
    enhance = {"brightness": ImageEnhance.Brightness, "saturation": ImageEnhance.Color}[name]
    for got, source, drawn in jittered(photos, **{name: 0.4}):
        assert difference(got, enhance(Image.fromarray(source.astype(np.uint8))).enhance(drawn[name])) < 0.6


def dalis_color_twist(image: np.ndarray, drawn: dict[str, float]) -> np.ndarray:
    """The formula in the documentation of DALI's color_twist.

    Hue turns the plane of the two colour axes of YIQ and saturation stretches it, then contrast goes about 128 and
    brightness multiplies. Pillow's contrast goes about the mean gray of the picture, and its hue, in HSV, changes the
    brightness of a colour: on these photographs they are 4 to 25 and 6 to 22 steps away.
    """
    yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
    angle = np.deg2rad(drawn["hue"])
    turn = np.eye(3)
    turn[1:, 1:] = drawn["saturation"] * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    turned = image @ (np.linalg.inv(yiq) @ turn @ yiq).T
    return (drawn["brightness"] * (128 + drawn["contrast"] * (turned - 128))).round().clip(0, 255)


@pytest.mark.parametrize(
    "amounts",
    [{"contrast": 0.8}, {"hue": 0.5}, {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}],
    ids="+".join,
)
def test_contrast_hue_and_all_of_colour_jitter_are_the_documented_formula(photos, amounts):
    for got, source, drawn in jittered(photos, **amounts):
        expected = dalis_color_twist(source, drawn)
        assert difference(got, expected) < 0.01
        assert np.abs(got - expected).max() < 1.5  # one step where rounding meets a half
        assert difference(source, expected) > 1  # and it did something


def test_random_erasing_sets_the_box_to_the_mean_and_nothing_else(photos):
    config = RandomErasingConfig(probability=1.0)
    settings = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    got = trained(photos, AugmentConfig(random_erasing=config), **settings)
    whole = trained(photos, AugmentConfig(), **settings)
    for i in got:
        box = random_erasing(config, Draws(5, np.zeros(1, np.int64), np.array([i])), (96, 96))
        (top, left), (height, width) = box["erase_start"][0].astype(int), box["erase_shape"][0].astype(int)
        expected = whole[i].copy()
        expected[top : top + height, left : left + width] = 0
        assert np.array_equal(got[i], expected)
        assert height * width > 0


def test_float16_is_float32_rounded(photos):
    single, half = (trained(photos, AugmentConfig(), dtype=dtype) for dtype in ("float32", "float16"))
    assert all(np.abs(single[i] - half[i]).max() <= 255 * 2**-11 for i in single)
