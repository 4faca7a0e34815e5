"""A dataset on disk, opened for reading."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class Dataset:
    """One split of a dataset."""

    name: str
    split: str
    num_classes: int
    class_names: tuple[str, ...]
    class_ids: tuple[str, ...]
    labels: NDArray[np.int64]
    fingerprint: str

    @classmethod
    def open(cls, path: Path, split: str) -> "Dataset":
        """Open a split; DataError when it is missing or does not agree with its index."""
        raise NotImplementedError

    def __len__(self) -> int:
        """Return the number of samples."""
        raise NotImplementedError
