"""The second half of building: merge the sorted units into shards, then publish them at once.

Only the table of all images is held in memory (about 90 bytes each: 1.3 GB for 14 M), and one shard per worker.
Each shard takes one contiguous range of each unit, so that scratch is read almost sequentially.
"""

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from data_pipeline.archive import entries
from data_pipeline.errors import StorageError
from data_pipeline.files import replacing, write_atomically
from data_pipeline.manifest import Manifest, Reject, Shard, Split, file_of
from data_pipeline.shards import index_text, sample_bytes, samples_of, write_shard

COLUMNS = ("label", "shard", "offset", "length", "width", "height", "crc32")
"""What readers need of every sample: see `data_pipeline.dataset.Dataset`."""
Table = dict[str, NDArray[Any]]
"""Columns of the images of a split in their final order, each (n,): COLUMNS, and the unit that holds an image, where in
it, and the image's original name."""


@dataclass(frozen=True)
class ShardJob:
    """One shard to be written to scratch."""

    path: Path
    """Where its files go, without an extension; the units are next to them."""
    first: int
    rows: Table

    @property
    def images(self) -> int:
        """How many images it holds."""
        return len(self.rows["label"])

    @property
    def record(self) -> Path:
        """Where it is written that the shard is complete."""
        return self.path.with_suffix(".json")

    def digest(self) -> str:
        """Identify what the shard holds: its images, their names and labels, and where it begins."""
        total = hashlib.sha256(str(self.first).encode())
        for column in ("label", "length", "crc32", "name"):
            total.update(self.rows[column].tobytes())
        return total.hexdigest()


class _Record(BaseModel):
    digest: str
    shard: Shard


def classes_of(units: Sequence[Path]) -> set[str]:
    """Return the ids of all classes that occur."""
    found: set[str] = set()
    for path in units:
        with np.load(path) as unit:
            found.update(unit["class_ids"].tolist())
    return found


def merge(units: Sequence[Path], class_ids: Sequence[str], shard_bytes: int) -> Table:
    """Bring the images of all units into the order of their keys and cut them into shards of nearly equal size."""
    number_of = {class_id: number for number, class_id in enumerate(class_ids)}
    columns: dict[str, list[NDArray[Any]]] = {}
    for number, path in enumerate(units):
        with np.load(path) as unit:
            labels = np.array([number_of[c] for c in unit["class_ids"].tolist()], np.int32)[unit["class_number"]]
            length = unit["length"]
            part = {field: unit[field] for field in ("key", "name", "width", "height", "crc32")}
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


def shard_jobs(table: Table, scratch: Path, prefix: str) -> Iterator[ShardJob]:
    """Yield the shards to write."""
    bounds = np.searchsorted(table["shard"], np.arange(table["shard"][-1] + 2)).tolist()
    for number, (low, high) in enumerate(pairwise(bounds)):
        rows = {field: column[low:high] for field, column in table.items()}
        yield ShardJob(scratch / f"{prefix}-{number:06d}", low, rows)


def write(job: ShardJob) -> Shard:
    """Write one shard, its index and then its record, whose presence means that both are complete."""
    job.record.unlink(missing_ok=True)  # an older one is of other images
    images: dict[int, bytes] = {}
    of = job.rows
    for unit in np.unique(of["unit"]).tolist():
        rows = np.flatnonzero(of["unit"] == unit)
        low = int(of["unit_offset"][rows[0]])
        high = int(of["unit_offset"][rows[-1]] + of["length"][rows[-1]])
        path = job.path.with_name(f"unit-{unit:06d}.bin")
        with path.open("rb") as stream:
            stream.seek(low)
            data = memoryview(stream.read(high - low))
        for row in rows.tolist():
            at = int(of["unit_offset"][row]) - low
            images[row] = bytes(data[at : at + int(of["length"][row])])
            if zlib.crc32(images[row]) != of["crc32"][row]:
                raise StorageError(
                    f"{path} is not as it was written; check the disk, remove {path.parent}, build again"
                )
    keys = (f"{job.first + row:08d}-{name.decode()}" for row, name in enumerate(of["name"].tolist()))
    tar, idx = job.path.with_suffix(".tar"), job.path.with_suffix(".idx")
    with replacing(tar) as out:
        write_shard(out, ((key, int(of["label"][row]), images.pop(row)) for row, key in enumerate(keys)))
    write_atomically(idx, index_text(samples_of(entries(tar), [])).encode())
    shard = Shard(samples=job.images, tar=file_of(tar), idx=file_of(idx))
    write_atomically(job.record, _Record(digest=job.digest(), shard=shard).model_dump_json().encode())
    return shard


def written(job: ShardJob) -> Shard | None:
    """Return the shard if an earlier build has written it, from the same images."""
    if not job.record.exists():
        return None
    record = _Record.model_validate_json(job.record.read_bytes())
    return record.shard if record.digest == job.digest() else None


def rejects(units: Sequence[Path]) -> list[Reject]:
    """Return what was left out, in the order of the source."""
    found: list[Reject] = []
    for path in units:
        found += [Reject(**entry) for entry in json.loads(path.with_suffix(".rejected.json").read_bytes())]
    return found


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
