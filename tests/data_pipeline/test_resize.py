"""Resizing as on a GPU (by DALI) and as on a CPU (by torch), both here, against Pillow on real photographs."""

from functools import partial
from itertools import repeat

import numpy as np
import pytest
from nvidia.dali import Pipeline, fn, types
from PIL import Image

from data_pipeline import graph
from tests.data_pipeline.images import originals
from tests.data_pipeline.test_parity import PILLOW

SIZES = [(96, 96), (128, 64), (40, 300), (500, 700)]
WAYS = {"DALI": graph.resize_by_dali, "torch": partial(graph.resize_by_torch, threads=2)}


def resized(way: str, images: list[np.ndarray], sizes: list[tuple[int, int]], interpolation: str) -> list[np.ndarray]:
    """Each picture resized to each size, in one batch for each size and then in one with all sizes mixed."""
    results = []
    own = [np.array(sizes[i % len(sizes)], np.float32) for i in range(len(images))]
    for size in (*sizes, None):
        pipe = Pipeline(len(images), 2, None, exec_dynamic=True)
        with pipe:
            pictures = fn.external_source(repeat(images), layout="HWC", dtype=types.UINT8, ndim=3)
            wanted = size or fn.external_source(repeat(own), ndim=1, dtype=types.FLOAT)
            pipe.set_outputs(WAYS[way](pictures, wanted, interpolation))
        pipe.build()
        (output,) = pipe.run()
        results += [np.array(output.at(i)) for i in range(len(images))]
    return results


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("interpolation", PILLOW)
def test_smaller_larger_and_other_shapes_are_pillows(photos, way, interpolation):
    images = originals(photos)
    got = resized(way, [np.asarray(image) for image in images], SIZES, interpolation)
    wanted = [(i, size) for size in SIZES for i in range(len(images))]
    wanted += [(i, SIZES[i % len(SIZES)]) for i in range(len(images))]
    for pixels, (i, (height, width)) in zip(got, wanted, strict=True):
        expected = np.asarray(images[i].resize((width, height), PILLOW[interpolation])).astype(int)
        assert pixels.shape == expected.shape
        apart = np.abs(pixels - expected)
        assert apart.mean() < 0.25
        if way == "torch":  # its weights have fewer bits than Pillow's: seen where many pixels become one
            assert apart.max() <= 5


def test_what_goes_wrong_while_resizing_is_told(photos):
    images = [np.asarray(originals(photos)[0])]
    with pytest.raises(RuntimeError, match="Input and output sizes should be greater than 0"):
        resized("torch", images, [(0, 5)], "bicubic")
    assert Image.fromarray(resized("torch", images, [(5, 5)], "bicubic")[0]).size == (5, 5)
