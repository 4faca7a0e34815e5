"""Handwritten digits: 1,797 scans that come with scikit-learn (UCI ML, Alpaydin & Kaynak 1998)."""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from data_pipeline.acceptance import encode
from data_pipeline.philox import permutation
from data_pipeline.sources import Source, SourceImage

_SIDE = 64
_INK = 16  # the scans count 0..16 dark pixels per cell
_SPLIT_SEED = 0


class Digits(Source):
    """The scans, enlarged smoothly from 8 x 8 to 64 x 64 pixels; every fifth one of each class is held out."""

    # Several shards, so that the smallest dataset has the shape of the largest.
    shard_bytes = 512 * 1024

    def __init__(self) -> None:
        classes, counts = {str(digit): str(digit) for digit in range(10)}, {"train": 1437, "val": 360}
        super().__init__(("train", "val"), {"source": "digits", "side": _SIDE}, classes, counts)

    def images(self, split: str) -> Iterator[SourceImage]:
        """Yield the scans of a split."""
        # Only here: scikit-learn takes a second to import.
        from sklearn.datasets import load_digits  # noqa: PLC0415

        scans, labels = load_digits(return_X_y=True)
        shuffled = permutation(len(labels), _SPLIT_SEED, stream=0)
        by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
        held_out = np.zeros(len(labels), bool)
        held_out[by_class[::5]] = True
        for number in np.flatnonzero(held_out == (split == "val")).tolist():
            cells = (scans[number].reshape(8, 8) * (255 / _INK)).round().astype(np.uint8)
            image = Image.fromarray(cells).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC).convert("RGB")
            yield SourceImage(f"scan{number:04d}", str(labels[number]), encode(image))
