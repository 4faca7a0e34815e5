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
