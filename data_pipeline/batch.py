"""What the loaders give, and how what belongs to it gets to the device."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def to_device(values: NDArray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy host memory to the device without waiting for the work that is queued there.

    Only from page-locked memory a GPU copies by itself.
    """
    tensor = torch.as_tensor(values)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def content_digest(sample_ids: NDArray[np.int64], labels: NDArray[np.int64], crc32: NDArray[np.uint32]) -> int:
    """Hash what a batch is made of, in any order: parts of a batch add up to the whole, modulo 2**64.

    Args:
        sample_ids: (m,) below 2**32.
        labels: (m,) of the samples.
        crc32: (m,) checksums of their encoded bytes.

    Returns:
        the sum of a 64-bit hash of each row, by two rounds of SplitMix64 (Steele et al. 2014), modulo 2**64.
    """
    words = sample_ids.astype(np.uint64) << np.uint64(32) | crc32
    for key in (np.uint64(0), labels.astype(np.uint64)):
        words = (words ^ key) + np.uint64(0x9E3779B97F4A7C15)
        words = (words ^ words >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ words >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        words ^= words >> np.uint64(31)
    return int(words.sum(dtype=np.uint64))


@dataclass(frozen=True)
class Batch:
    """A rank's micro-batch of m images."""

    images: torch.Tensor
    """(m, 3, H, W) float32 on the device, normalized."""
    labels: torch.Tensor
    """(m,) int64 on the device."""
    sample_ids: NDArray[np.int64]
    """(m,) which sample of the dataset is seen in each row; for a bad sample, the one that replaces it."""
    epochs: NDArray[np.int64]
    """(m,) which epoch each row belongs to; a batch may cross the boundary."""
    rows: NDArray[np.int64]
    """(m,) the row in the global batch (training) or in the split (evaluation)."""
    valid: NDArray[np.bool_]
    """(m,) False only in evaluation: for padding, and for a bad sample, which is reported."""
    drawn: Any = None
    """What the loader's `draw` returned for these rows."""
    digest: int = 0
    """`content_digest` of the rows."""


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be used, and its replacement."""

    id: int
    name: str
    """Name of its member in the shard, which ends with the name of the original file."""
    shard: str
    reason: str
    replaced_by: int
    """Id of the sample that is seen instead."""
