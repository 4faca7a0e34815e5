"""The second half of building: merge the sorted units into shards, then publish them at once.

Only the table of all images is held in memory (about 90 bytes each: 1.3 GB for 14 M), and one shard per worker.
Each shard takes one contiguous range of each unit, so that scratch is read almost sequentially.
"""

import hashlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import StorageError
from data_pipeline.files import replacing, write_atomically
from data_pipeline.manifest import Manifest, Reject, Shard, Split, file_of
from data_pipeline.shards import index_text, sample_bytes, samples_in, write_shard
from data_pipeline.units import Unit
from data_pipeline.workers import Job

COLUMNS = ("label", "shard", "offset", "length", "width", "height", "crc32")
"""What readers need of every sample: see `data_pipeline.dataset.Dataset`."""
Table = dict[str, NDArray[Any]]
"""Columns of the images of a split in their final order, each (n,): COLUMNS, and the unit that holds an image, where in
it, and the image's original name."""


def merge(units: Mapping[Path, Unit], class_ids: Sequence[str], shard_bytes: int) -> Table:
    """Bring the images of all units into the order of their keys and cut them into shards of nearly equal size."""
    number_of = {class_id: number for number, class_id in enumerate(class_ids)}
    columns: dict[str, list[NDArray[Any]]] = {}
    for number, (path, unit) in enumerate(units.items()):
        with np.load(path.with_suffix(".npz")) as table:
            labels = np.array([number_of[c] for c in unit.class_ids], np.int32)[table["class_number"]]
            length = table["length"]
            part = {field: table[field] for field in ("key", "name", "width", "height", "crc32")}
        part |= {"label": labels, "length": length, "unit": np.full(len(length), number, np.int32)}
        part["unit_offset"] = np.cumsum(length, dtype=np.int64) - length
        for field, values in part.items():
            columns.setdefault(field, []).append(values)
    order = np.argsort(np.concatenate(columns.pop("key")), kind="stable")
    merged = {field: np.concatenate(columns.pop(field))[order] for field in list(columns)}
    sizes = np.array([sample_bytes(0)], np.int64) + -(-merged["length"].astype(np.int64) // 512) * 512
    begin = np.cumsum(sizes) - sizes
    total = int(sizes.sum())
    shard = (begin * -(-total // shard_bytes) // total).astype(np.int32)
    start_of_shard = begin[np.searchsorted(shard, np.arange(shard[-1] + 1))]
    offset = begin - start_of_shard[shard] + sample_bytes(0)
    return {"shard": shard, "offset": offset, **merged}


def shard_jobs(table: Table, scratch: Path, prefix: str) -> Iterator[Job[Shard]]:
    """Yield the shards to write."""
    bounds = np.searchsorted(table["shard"], np.arange(table["shard"][-1] + 2)).tolist()
    for number, (low, high) in enumerate(pairwise(bounds)):
        rows = {field: column[low:high] for field, column in table.items()}
        digest = hashlib.sha256(str(low).encode())
        for column in ("label", "length", "crc32", "name"):
            digest.update(rows[column].tobytes())
        path = scratch / f"{prefix}-{number:06d}"
        yield Job(path, high - low, digest.hexdigest(), partial(write, path, low, rows), Shard)


def write(path: Path, first: int, rows: Table) -> Shard:
    """Write one shard and its index; the units are next to it.

    Args:
        path: where its files go, without an extension.
        first: position of its first image.
        rows: its part of the table.
    """
    images: dict[int, bytes] = {}
    for unit in np.unique(rows["unit"]).tolist():
        inside = np.flatnonzero(rows["unit"] == unit)
        begin, length = rows["unit_offset"][inside], rows["length"][inside]
        source = path.with_name(f"unit-{unit:06d}.bin")
        with source.open("rb") as stream:
            stream.seek(int(begin[0]))
            data = memoryview(stream.read(int(begin[-1] + length[-1] - begin[0])))
        for row, start, size in zip(inside.tolist(), (begin - begin[0]).tolist(), length.tolist(), strict=True):
            images[row] = bytes(data[start : start + size])
            if zlib.crc32(images[row]) != rows["crc32"][row]:
                raise StorageError(
                    f"{source} is not as it was written; check the disk, remove {source.parent}, build again"
                )
    keys = (f"{first + row:08d}-{name.decode()}" for row, name in enumerate(rows["name"].tolist()))
    tar, idx = path.with_suffix(".tar"), path.with_suffix(".idx")
    with replacing(tar) as out:
        write_shard(out, ((key, int(rows["label"][row]), images.pop(row)) for row, key in enumerate(keys)))
    write_atomically(idx, index_text(samples_in(tar)).encode())
    return Shard(samples=len(rows["label"]), tar=file_of(tar), idx=file_of(idx))


def shards_in(folder: Path, prefix: str) -> list[Path]:
    """Return the shards of a split in a folder, without those of a split whose name has the same beginning."""
    return sorted(folder.glob(f"{prefix}-{'[0-9]' * 6}.tar"))


def publish(shards: Sequence[Shard], scratch: Path, dest: Path, prefix: str) -> None:
    """Move the shards to their place; may be interrupted and called again."""
    names = [file.name for shard in shards for file in (shard.tar, shard.idx)]
    expected = set(names)
    for path in shards_in(dest, prefix):
        if path.name not in expected:  # the source was larger when an earlier build was interrupted here
            path.with_suffix(".idx").unlink(missing_ok=True)
            path.unlink()
    for name in names:
        if (scratch / name).exists():
            (scratch / name).replace(dest / name)
        elif not (dest / name).exists():
            raise StorageError(f"{dest / name} vanished while the dataset was built; remove {scratch}, build again")


def with_split(
    manifest: Manifest | None,
    split: str,
    path: Path,
    table: Table,
    *,
    classes: Mapping[str, str],
    shards: list[Shard],
    rejected: list[Reject],
    built: dict[str, Any],
) -> Manifest:
    """Write the table of a split to `path`, and return what dataset.json says with that split."""
    with replacing(path) as out:
        np.savez(out, allow_pickle=False, **{field: table[field] for field in COLUMNS})
    entry = Split(
        samples=len(table["label"]),
        class_counts=np.bincount(table["label"], minlength=len(classes)).tolist(),
        shards=shards,
        table=file_of(path),
        rejected=rejected,
        built=built,
    )
    splits = (manifest.splits if manifest is not None else {}) | {split: entry}
    return Manifest(
        name=path.parent.resolve().name, class_ids=list(classes), class_names=list(classes.values()), splits=splits
    )
