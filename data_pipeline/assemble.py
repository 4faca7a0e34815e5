"""The second half of building: merge the sorted units into shards, then publish them at once.

Only the table of all images is held in memory (about 90 bytes each: 1.3 GB for 14 M), and one shard per worker.
Each shard takes one contiguous range of each unit, so that scratch is read almost sequentially.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from data_pipeline.errors import StorageError
from data_pipeline.files import replacing, write_atomically
from data_pipeline.manifest import File, Reject, Shard, file_of
from data_pipeline.shards import crc32, index_text, sample_bytes, write_shard

_OF_A_JOB = ("label", "length", "crc32", "unit", "unit_offset", "name")
COLUMNS = ("label", "shard", "offset", "length", "width", "height", "crc32")


def save_table(path: Path, columns: dict[str, NDArray[Any]]) -> None:
    """Write NAME-split.samples.npz atomically; every column is (samples,), in the order of the shards."""
    with replacing(path) as out:
        np.savez(out, allow_pickle=False, **{field: columns[field] for field in COLUMNS})


@dataclass(frozen=True)
class Table:
    """All images of a split in their final order; every array is (n,)."""

    label: NDArray[np.int32]
    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    length: NDArray[np.int32]
    width: NDArray[np.uint16]
    height: NDArray[np.uint16]
    crc32: NDArray[np.uint32]
    unit: NDArray[np.int32]
    unit_offset: NDArray[np.int64]
    name: NDArray[np.bytes_]

    def save(self, path: Path) -> None:
        """Write what readers need as NAME-split.samples.npz, atomically."""
        save_table(path, {field: getattr(self, field) for field in COLUMNS})


@dataclass(frozen=True)
class ShardJob:
    """One shard to be written to scratch."""

    stem: Path
    units: Path
    first: int
    label: NDArray[np.int32]
    length: NDArray[np.int32]
    crc32: NDArray[np.uint32]
    unit: NDArray[np.int32]
    unit_offset: NDArray[np.int64]
    name: NDArray[np.bytes_]

    @property
    def record(self) -> Path:
        """Where it is written that the shard is complete."""
        return self.stem.with_suffix(".json")

    def digest(self) -> str:
        """Identify what the shard holds: its images, their names and labels, and where it begins."""
        total = hashlib.sha256(str(self.first).encode())
        for column in (self.label, self.length, self.crc32, self.name):
            total.update(column.tobytes())
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
    return Table(shard=shard, offset=offset, **merged)


def shard_jobs(table: Table, units: Path, folder: Path, prefix: str) -> Iterator[ShardJob]:
    """Yield the shards to write; `folder` is where they go, `units` where the images are."""
    bounds = np.searchsorted(table.shard, np.arange(table.shard[-1] + 2))
    for number, (low, high) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        part = {f: getattr(table, f)[low:high] for f in _OF_A_JOB}
        yield ShardJob(folder / f"{prefix}-{number:06d}", units, low, **part)


def write(job: ShardJob) -> Shard:
    """Write one shard, its index and then its record, whose presence says that both are complete."""
    job.record.unlink(missing_ok=True)  # an older one, of other images, says nothing of what is written now
    images: dict[int, bytes] = {}
    for unit in np.unique(job.unit).tolist():
        rows = np.flatnonzero(job.unit == unit)
        low = int(job.unit_offset[rows[0]])
        high = int(job.unit_offset[rows[-1]] + job.length[rows[-1]])
        path = job.units / f"unit-{unit:06d}.bin"
        with path.open("rb") as stream:
            stream.seek(low)
            data = memoryview(stream.read(high - low))
        for row in rows.tolist():
            at = int(job.unit_offset[row]) - low
            images[row] = bytes(data[at : at + int(job.length[row])])
            if crc32(images[row]) != job.crc32[row]:
                raise StorageError(f"{path} is not as it was written; check the disk, remove {job.units}, build again")
    keys = (f"{job.first + row:08d}-{name.decode()}" for row, name in enumerate(job.name.tolist()))
    tar, idx = job.stem.with_suffix(".tar"), job.stem.with_suffix(".idx")
    with replacing(tar) as out:
        samples = ((key, int(job.label[row]), images.pop(row)) for row, key in enumerate(keys))
        written = write_shard(out, samples)
    write_atomically(idx, index_text(entry.index for entry in written).encode())
    shard = Shard(samples=len(written), tar=file_of(tar), idx=file_of(idx))
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
    """Return the shards of a split that lie in a folder; not those of a split whose name only begins alike."""
    return sorted(folder.glob(f"{prefix}-{'[0-9]' * 6}.tar"))


def publish(shards: Sequence[Shard], scratch: Path, dest: Path, prefix: str) -> None:
    """Move the shards to their place; may be interrupted and called again."""
    names = {file.name for file in _files(shards)}
    for path in shards_in(dest, prefix):
        if path.name not in names:  # the source was larger when an earlier build was interrupted here
            path.with_suffix(".idx").unlink(missing_ok=True)
            path.unlink()
    for file in _files(shards):
        if (scratch / file.name).exists():
            (scratch / file.name).replace(dest / file.name)
        elif not (dest / file.name).exists():
            raise StorageError(
                f"{dest / file.name} vanished while the dataset was built; remove {scratch}, build again"
            )


def _files(shards: Sequence[Shard]) -> Iterator[File]:
    for shard in shards:
        yield shard.tar
        yield shard.idx
