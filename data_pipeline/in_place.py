"""WebDataset shards from elsewhere, used in place: an index, a table and dataset.json are written, no shard is changed.

Samples must have a `cls` member with a number. Every image is fully decoded; what `data_pipeline.acceptance` does not
accept as it is, and every sample without exactly one image and one label, is left out of the table and listed in
dataset.json.
"""

import hashlib
import zlib
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray

from data_pipeline.acceptance import Rejected, size_as_it_is
from data_pipeline.archive import Extent, is_compressed
from data_pipeline.assemble import with_split
from data_pipeline.errors import DataError, printable
from data_pipeline.files import write_atomically
from data_pipeline.manifest import FILE_NAME, INFO_NAME, Manifest, Reject, Shard, file_of, publish
from data_pipeline.shards import STRAY, Labels, Sample, index_text, samples_in
from data_pipeline.sources.shards import Shards
from data_pipeline.workers import Advance, run_all

_ROW = np.dtype(
    [
        ("label", np.int32), ("offset", np.int64), ("length", np.int32), ("width", np.uint16), ("height", np.uint16),
        ("crc32", np.uint32),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A shard to be indexed."""

    tar: Path
    dest: Path
    """The dataset's folder."""
    beside: bool
    """Whether the index is written next to the shard; else in the dataset's folder."""

    @property
    def name(self) -> str:
        """The shard's name in dataset.json: relative to the dataset's folder if it is inside."""
        tar, dest = self.tar.parent.resolve() / self.tar.name, self.dest.resolve()  # the shard itself may be a link
        return str(tar.relative_to(dest) if tar.is_relative_to(dest) else tar)

    @property
    def idx(self) -> Path:
        """The index."""
        if self.beside:
            return self.tar.with_suffix(".idx")
        return self.dest / f"{self.tar.stem}-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}.idx"


def index_in_place(source: Shards, dest: Path, pool: Executor | None, advance: Advance, *, beside: bool) -> list[str]:
    """Index shards and add them to dest/dataset.json, all splits at once.

    Args:
        source: the shards, plain tar archives.
        dest: the dataset's folder.
        pool: where shards are indexed.
        advance: called for each shard that is done.
        beside: write each index next to its shard; else into `dest`.

    Returns:
        the splits that were added; others were there before, with the same shards.

    Raises:
        DataError: a shard is damaged, an index is not its own, or nothing can be used. No index is left behind then.
    """
    manifest = Manifest.read(dest) if (dest / FILE_NAME).exists() else None
    jobs = {split: [Job(path, dest, beside) for path in paths] for split, paths in source.paths.items()}
    for job in (job for group in jobs.values() for job in group):
        if is_compressed(job.tar):
            raise DataError(
                f"{job.tar} is compressed and cannot be read in place; convert the shards: name another DEST"
            )
        if printable(job.name) != job.name:
            raise DataError(f"{job.tar} has a name that is not UTF-8; rename it")
    for split, entry in (manifest.splits if manifest is not None else {}).items():
        there = [(shard.tar.name, shard.tar.bytes) for shard in entry.shards]
        if [(job.name, job.tar.stat().st_size) for job in jobs.pop(split, [])] not in ([], there):
            raise DataError(f"{dest} already holds a split '{split}'; name another with --split, or remove {FILE_NAME}")
    left = [job for group in jobs.values() for job in group]
    new = [job.idx for job in left if not job.idx.exists()]
    results = {}
    try:
        for job, result in run_all(pool, index_shard, left, len(left)):
            results[job] = result
            advance(1)
        if jobs:
            _add({split: [results[job] for job in group] for split, group in jobs.items()}, source, manifest, dest)
    except BaseException:
        for path in new:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        raise
    return list(jobs)


def _add(
    results: dict[str, list[tuple[NDArray[Any], list[Reject], Shard]]],
    source: Shards,
    manifest: Manifest | None,
    dest: Path,
) -> None:
    """Write the tables and dataset.json."""
    tables, rejected = {}, {}
    for split, shards in results.items():
        rows = np.concatenate([found for found, _, _ in shards])
        rejected[split] = [reject for _, rejects, _ in shards for reject in rejects]
        if not len(rows):
            first = rejected[split][0]
            raise DataError(f"no sample of split '{split}' can be used in place; {first.name}: {first.reason}")
        number = np.repeat(np.arange(len(shards), dtype=np.int32), [len(found) for found, _, _ in shards])
        tables[split] = {name: rows[name] for name in _ROW.names or ()} | {"shard": number}
    largest = max(int(table["label"].max()) for table in tables.values())
    if manifest is not None:
        names = dict(zip(manifest.class_ids, manifest.class_names, strict=True))
    else:
        names = source.class_names({str(largest)})
    if largest >= len(names):
        raise DataError(
            f"the shards have label {largest}, but there are {len(names)} classes; index the split with all of them "
            f"first, or correct {INFO_NAME}"
        )
    for split, table in tables.items():
        manifest = with_split(
            manifest,
            split,
            dest / f"{dest.resolve().name}-{split}.samples.npz",
            table,
            classes=names,
            shards=[shard for _, _, shard in results[split]],
            rejected=rejected[split],
            built={"source": "shards in place", "pillow": PIL.__version__},
        )
    assert manifest is not None
    publish(manifest, dest)


def index_shard(job: Job) -> tuple[NDArray[Any], list[Reject], Shard]:
    """Return a shard's rows of the table, (n,) of _ROW, what was left out, and its record; write a missing index."""
    samples = list(samples_in(job.tar))
    if all(sample.fault == STRAY for sample in samples):
        raise DataError(f"{job.tar} holds no samples; take it out of the folder")
    text = index_text(samples)
    if not job.idx.exists():
        write_atomically(job.idx, text.encode())
    elif job.idx.read_bytes() != text.encode():
        raise DataError(f"{job.idx} is not the index of {job.tar.name}; remove it and it will be made again")
    rows, rejected = [], []
    for sample in samples:
        row = _row(sample)
        if isinstance(row, Rejected):
            rejected.append(Reject(name=f"{job.tar.name}:{sample.key}", reason=row.reason))
        else:
            rows.append(row)
    idx = str(Path(job.name).with_suffix(".idx")) if job.beside else job.idx.name
    record = Shard(samples=len(rows), tar=file_of(job.tar, job.name), idx=file_of(job.idx, idx))
    return np.array(rows, _ROW), rejected, record


def _row(sample: Sample) -> tuple[int, ...] | Rejected:
    image, class_id = sample.image(), Labels().of(sample, ("cls",))
    if isinstance(image, Rejected):
        return image
    if isinstance(class_id, Rejected):
        return class_id
    if not class_id.isdigit():
        return Rejected(f"its label is no number (build a dataset from the shards): {class_id[:40]!r}")
    assert isinstance(image.content, Extent)
    data = image.content.read()
    size = size_as_it_is(data)
    return size if isinstance(size, Rejected) else (int(class_id), image.offset, image.size, *size, zlib.crc32(data))
