"""What a run reads: how many pictures of how many bytes, and how fast its storage gives them."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.dataset import Dataset
from data_pipeline.errors import DataError
from pretrain.outcome import UserError
from pretrain.recipe import Recipe

ASSUMED_BYTES = 115_000
"""Of one picture, where the dataset is not there: ImageNet-1k's training archive has 147.9 GB for 1,281,167."""
SAMPLE_BYTES, SAMPLE_S = 2**30, 5.0
"""How much, and how long, storage is read to see how fast it is."""
_CHUNK = 4 * 2**20


@dataclass(frozen=True)
class Data:
    """The training split."""

    images: int
    classes: int
    bytes_per_image: float
    where_from: str
    """Where these numbers come from."""


def look_at_data(recipe: Recipe, images: int | None, classes: int | None, bytes_per_image: float | None) -> Data:
    """Count the dataset, or take what the command line says.

    Raises:
        UserError: the dataset cannot be opened and its numbers are not given.
    """
    if images is not None and classes is not None:
        size = ASSUMED_BYTES if bytes_per_image is None else bytes_per_image
        how = "assumed, as ImageNet-1k's" if bytes_per_image is None else "given"
        return Data(images, classes, size, f"given with --images and --classes; bytes per image {how}")
    try:
        split = Dataset.open(recipe.data.path, recipe.data.train_split, recipe.data.cache)
    except DataError as error:
        raise UserError(f"{error}; or plan without it: --images N --classes N [--bytes-per-image N]") from None
    size = sum(shard.tar.bytes for shard in split.shards) / len(split)
    return Data(
        images or len(split),
        classes or split.num_classes,
        bytes_per_image or size,
        f"{recipe.data.path}, {len(split.shards)} shards",
    )


def measure_storage(recipe: Recipe) -> float:
    """Bytes per second of one reader that goes through some shards from their beginning, past the page cache.

    Raises:
        UserError: there is no local dataset to read.
    """
    try:
        split = Dataset.open(recipe.data.path, recipe.data.train_split, recipe.data.cache)
        files = [split.shard_path(shard) for shard in range(len(split.shards))]
    except DataError as error:
        raise UserError(f"--measure-storage: {error}") from None
    return read_speed(files)


def read_speed(files: list[Path], limit: int = SAMPLE_BYTES, seconds: float = SAMPLE_S) -> float:
    """Bytes per second of reading files one after the other, until a limit of bytes or seconds."""
    done, began = 0, time.perf_counter()
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            if hasattr(os, "posix_fadvise"):  # what is in memory from earlier would flatter the disk
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            while chunk := os.read(descriptor, _CHUNK):
                done += len(chunk)
                if done >= limit or time.perf_counter() - began > seconds:
                    return done / (time.perf_counter() - began)
        finally:
            os.close(descriptor)
    return done / max(time.perf_counter() - began, 1e-9)
