"""Handwritten digits: 1,797 scans that come with scikit-learn (UCI ML, Alpaydin & Kaynak 1998)."""

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.acceptance import encode
from data_pipeline.philox import permutation
from data_pipeline.sources import SourceImage

_SIDE = 64
_INK = 16  # the scans count 0..16 dark pixels per cell
_SPLIT_SEED = 0


class Digits:
    """The scans, enlarged smoothly from 8 x 8 to 64 x 64 pixels; every fifth one of each class is held out."""

    splits = ("train", "val")
    # Several shards, so that the smallest dataset has the shape of the largest.
    shard_bytes = 512 * 1024

    def describe(self) -> dict[str, Any]:
        """Say what decides the images."""
        return {"source": "digits", "side": _SIDE}

    def class_names(self, found: Collection[str]) -> dict[str, str]:  # noqa: ARG002  (always the same)
        """Return the ten digits."""
        return {str(digit): str(digit) for digit in range(10)}

    def count(self, split: str) -> int:
        """Return the number of scans in a split."""
        return {"train": 1437, "val": 360}[split]

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
