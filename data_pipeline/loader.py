"""Batches on the device, in the order that `data_pipeline.order` states."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.dataset import Dataset
from data_pipeline.transforms import InputConfig


@dataclass(frozen=True)
class Batch:
    """A rank's micro-batch of m pictures."""

    images: torch.Tensor
    """(m, 3, H, W) float32 on the device, normalised."""
    labels: torch.Tensor
    """(m,) int64 on the device."""
    sample_ids: NDArray[np.int64]
    """(m,) which sample of the dataset stands in each row."""
    epochs: NDArray[np.int64]
    """(m,) which epoch each row belongs to; a batch may cross the boundary."""
    rows: NDArray[np.int64]
    """(m,) the row in the global batch."""
    valid: NDArray[np.bool_]
    """(m,) False only for padding in evaluation."""


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be used, and what stands in its place."""

    id: int
    name: str
    shard: str
    reason: str
    replaced_by: int


class TrainLoader:
    """This rank's micro-batches, for ever."""

    def __init__(
        self,
        dataset: Dataset,
        config: InputConfig,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        device: torch.device,
        start_sample: int = 0,
        local_ranks: int = 1,
        on_bad_sample: Callable[[BadSample], None] | None = None,
    ) -> None:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Batch]:
        """Yield micro-batches without end."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop prefetching and free the device's memory."""


class EvalLoader:
    """Every sample of a split exactly once over all ranks; may be iterated again and again."""

    def __init__(
        self,
        dataset: Dataset,
        config: InputConfig,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        device: torch.device,
        local_ranks: int = 1,
        on_bad_sample: Callable[[BadSample], None] | None = None,
    ) -> None:
        raise NotImplementedError

    def __len__(self) -> int:
        """Return the number of batches, equal on every rank."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Batch]:
        """Yield the rank's share of the split once."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop prefetching and free the device's memory."""
