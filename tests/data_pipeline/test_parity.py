"""Every step of the graph against Pillow on real photographs, within stated bounds.

Mean absolute differences are in steps of 8 bits. JPEG decoders differ by a rounding here and there, and resizing with
antialiasing rounds at other places: both stay below one step on average.
"""

import io
import random
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy.stats import ks_2samp
from sklearn.datasets import load_sample_images

from data_pipeline import auto_augment
from data_pipeline.build import main as build
from data_pipeline.dataset import Dataset
from data_pipeline.draws import Draws, random_erasing, random_resized_crop
from data_pipeline.loader import EvalLoader, TrainLoader
from data_pipeline.reader import Reader
from data_pipeline.transforms import (
    AffineConfig,
    AugmentConfig,
    ColorJitterConfig,
    InputConfig,
    RandAugmentConfig,
    RandomErasingConfig,
    RandomResizedCropConfig,
)

CPU = torch.device("cpu")
PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1), "threads": 1}
PILLOW = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for number, array in enumerate(load_sample_images().images):
        folder = root / "in" / f"class{number}"
        folder.mkdir(parents=True)
        whole = Image.fromarray(array)  # 640 x 427
        for i, image in enumerate((whole, whole.crop((100, 50, 400, 420)), whole.resize((333, 250)))):
            image.save(folder / f"{i}.jpg", quality=92)
    assert build([str(root / "in"), str(root / "out"), "--workers", "1"]) == 0
    return Dataset.open(root / "out", "train")


def originals(dataset: Dataset) -> list[Image.Image]:
    reader = Reader(dataset)
    images = [Image.open(io.BytesIO(reader.read(i)[0].tobytes())).convert("RGB") for i in range(len(dataset))]
    reader.close()
    return images


def trained(dataset: Dataset, augment: AugmentConfig, **changes) -> dict[int, np.ndarray]:
    """One epoch of training pictures by sample id, HWC in steps of 8 bits."""
    config = InputConfig(path=dataset.path, augment=augment, **(PLAIN | {"image_size": 96} | changes))
    loader = TrainLoader(dataset, config, seed=5, global_batch=6, micro_batch=6, rank=0, world_size=1, device=CPU)
    batch = next(iter(loader))
    loader.close()
    pixels = (batch.images.float() * 255).permute(0, 2, 3, 1).numpy()
    return dict(zip(batch.sample_ids.tolist(), pixels, strict=True))


def difference(a: np.ndarray, b: Image.Image | np.ndarray) -> float:
    return float(np.abs(a - np.asarray(b, np.float32)).mean())


@pytest.mark.parametrize("interpolation", PILLOW)
@pytest.mark.parametrize(("size", "ratio"), [(224, 0.875), (96, 1.0), ((128, 64), 0.9)])
def test_evaluation_is_pillows_resize_and_centre_crop(photos, interpolation, size, ratio):
    config = InputConfig(path=photos.path, image_size=size, eval_crop_ratio=ratio, interpolation=interpolation, **PLAIN)
    loader = EvalLoader(photos, config, batch_size=6, rank=0, world_size=1, device=CPU)
    (batch,) = list(loader)
    loader.close()
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
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 375).all()
    assert (left + width <= 500).all()
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


def test_half_of_the_pictures_are_flipped():
    draws = Draws(1, np.repeat(np.arange(10), 1000), np.tile(np.arange(1000), 10))
    assert abs((draws.uniform(16, 1) < 0.5).mean() - 0.5) < 0.02


def test_an_affine_turn_is_pillows_rotation_about_the_centre(photos):
    from data_pipeline.draws import affine

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


@pytest.mark.parametrize("name", ["brightness", "saturation"])
def test_colour_jitter_is_pillows_enhancement(photos, name):
    from data_pipeline.draws import color_jitter

    config = ColorJitterConfig(**{name: 0.4})
    got, whole = trained(photos, AugmentConfig(color_jitter=config)), trained(photos, AugmentConfig())
    for i in got:
        factor = float(color_jitter(config, Draws(5, np.zeros(1, np.int64), np.array([i])))[name][0])
        source = Image.fromarray(whole[i].round().clip(0, 255).astype(np.uint8))
        enhance = {"brightness": ImageEnhance.Brightness, "saturation": ImageEnhance.Color}[name]
        assert difference(got[i], enhance(source).enhance(factor)) < 1.5


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


@pytest.fixture(scope="module")
def policies() -> dict[str, np.ndarray]:
    """What DALI makes of a photograph with each operation of our RandAugment at magnitude 9, by its name."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.pipeline import do_not_convert

    config = AugmentConfig(rand_augment=RandAugmentConfig(operations=1))
    names = [op.name for op in auto_augment.RAND_AUGMENT]
    n = len(names)
    given = {"operation": np.arange(n)[:, None], "strength": np.full((n, 1), round(M * 30)), "sign": np.zeros((n, 1))}
    source = do_not_convert(lambda: [values.astype(np.int32) for values in given.values()])

    @pipeline_def(batch_size=n, num_threads=1, device_id=None, enable_conditionals=True, prefetch_queue_depth=1)
    def graph():
        pixels = fn.reshape(types.Constant(np.asarray(photograph()), device="cpu"), layout="HWC")
        operation, strength, sign = fn.external_source(source, num_outputs=3, ndim=1, dtype=types.INT32)
        inputs = {"operation": operation, "strength": strength, "sign": sign}
        return auto_augment.apply(pixels, config, inputs, (90, 120))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        (out,) = graph().run()
    return dict(zip(names, np.array(out.as_tensor()).astype(np.float32), strict=True))


def photograph() -> Image.Image:
    return Image.fromarray(load_sample_images().images[0]).resize((120, 90))


def opencvs_equalize(image: np.ndarray) -> np.ndarray:
    """Equalize as OpenCV does, whose formula DALI follows; Pillow's is about 2 steps away on this photograph."""
    out = []
    for channel in image.transpose(2, 0, 1):
        total = np.bincount(channel.reshape(-1), minlength=256).cumsum()
        lowest = total[channel.min()]
        table = np.rint((total - lowest) * 255 / (channel.size - lowest)).clip(0, 255)
        out.append(table[channel])
    return np.stack(out, axis=-1)


M = 0.9  # magnitude 9 of 10: bin 27 of 0..30
POLICIES = {
    "auto_contrast": (ImageOps.autocontrast, 1.0),
    "invert": (ImageOps.invert, 0.0),
    "solarize": (lambda im: ImageOps.solarize(im, 256 - 256 * M), 0.6),
    "posterize": (lambda im: ImageOps.posterize(im, 1), 0.0),
    "brightness": (lambda im: ImageEnhance.Brightness(im).enhance(1 + 0.9 * M), 1.0),
    "color": (lambda im: ImageEnhance.Color(im).enhance(1 + 0.9 * M), 1.5),
    "contrast": (lambda im: ImageEnhance.Contrast(im).enhance(1 + 0.9 * M), 1.5),
    "sharpness": (lambda im: ImageEnhance.Sharpness(im).enhance(1 + 0.9 * M), 1.0),
    "equalize": (lambda im: opencvs_equalize(np.asarray(im)), 0.01),
    "identity": (lambda im: im, 0.0),
}


@pytest.mark.parametrize("operation", POLICIES)
def test_each_operation_of_rand_augment_is_pillows_but_for_equalize(policies, operation):
    reference, bound = POLICIES[operation]
    inner = np.s_[1:-1, 1:-1]  # Pillow leaves the border as it is when it sharpens
    assert difference(policies[operation][inner], np.asarray(reference(photograph()))[inner]) <= bound


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


def test_float16_is_float32_rounded(photos):
    single = trained(photos, AugmentConfig())
    half = trained(photos, AugmentConfig(), dtype="float16")
    assert all(np.abs(single[i] - half[i]).max() <= 255 * 2**-11 for i in single)
