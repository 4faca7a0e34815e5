"""Made photographs in real shards, by the door that people use: what the benchmarks of the input read."""

import contextlib
import io
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from data_pipeline.build import main as build

SHAPE = (375, 500)
"""Height and width of each, in pixels."""


def make_photos(folder: Path, count: int) -> None:
    """Write photographs of `SHAPE`, cut from scikit-learn's two and enlarged as they need."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(array) for array in load_sample_images().images]
    for number in range(count):
        image = images[number % 2]
        width = int(rng.integers(320, 600))
        height = width * 3 // 4
        left, top = rng.integers(0, image.width - width), rng.integers(0, max(1, image.height - height))
        label = folder / f"class{number % 10}"
        label.mkdir(parents=True, exist_ok=True)
        box = (int(left), int(top), int(left) + width, min(int(top) + height, image.height))
        image.crop(box).resize(SHAPE[::-1], Image.Resampling.LANCZOS).save(label / f"{number}.jpg", quality=92)


def build_shards(folder: Path, count: int) -> Path:
    """Build a dataset of so many photographs in ``folder``; where it is."""
    make_photos(folder / "photos", count)
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        status = build([str(folder / "photos"), str(folder / "shards")])
    if status:
        raise RuntimeError(f"building shards of made photographs ended with {status}: {told.getvalue()}")
    return folder / "shards"
