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
from typing import IO, Any

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

ROW = np.dtype([
    ("label", np.int32), ("offset", np.int64), ("length", np.int32), ("crc32", np.uint32), ("width", np.uint16),
    ("height", np.uint16),
])  # fmt: skip
"""A row of the table; the size of the image is in pixels, as it is decoded."""


@dataclass(frozen=True)
class Job:
    """A shard to be indexed; dataset.json names files relative to its folder where they are inside."""

    tar: Path
    name: str
    idx: Path
    idx_name: str


def _job(tar: Path, dest: Path, *, beside: bool) -> Job:
    if is_compressed(tar):
        raise DataError(f"{tar} is compressed and cannot be read in place; convert the shards: name another DEST")
    here, root = tar.parent.resolve() / tar.name, dest.resolve()  # the shard itself may be a link
    name = str(here.relative_to(root) if here.is_relative_to(root) else here)
    if printable(name) != name:
        raise DataError(f"{tar} has a name that is not UTF-8; rename it")
    if beside:
        return Job(tar, name, tar.with_suffix(".idx"), str(Path(name).with_suffix(".idx")))
    idx = f"{tar.stem}-{hashlib.sha256(name.encode()).hexdigest()[:8]}.idx"
    return Job(tar, name, dest / idx, idx)


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
    jobs = {split: [_job(path, dest, beside=beside) for path in paths] for split, paths in source.paths.items()}
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


Indexed = tuple[NDArray[Any], list[Reject], Shard]
"""A shard's rows of the table, (n,) of ROW, what was left out, and its record."""


def _add(results: dict[str, list[Indexed]], source: Shards, manifest: Manifest | None, dest: Path) -> None:
    """Write the tables and dataset.json."""
    rows = {split: np.concatenate([found for found, _, _ in shards]) for split, shards in results.items()}
    rejected = {split: [reject for _, rejects, _ in shards for reject in rejects] for split, shards in results.items()}
    for split in results:
        if not len(rows[split]):
            first = rejected[split][0]
            raise DataError(f"no sample of split '{split}' can be used in place; {first.name}: {first.reason}")
    largest = max(int(found["label"].max()) for found in rows.values())
    classes = source.classes or {str(label): str(label) for label in range(largest + 1)}
    if manifest is not None:
        classes = dict(zip(manifest.class_ids, manifest.class_names, strict=True))
    if largest >= len(classes):
        raise DataError(
            f"the shards have label {largest}, but there are {len(classes)} classes; index the split with all of them "
            f"first, or correct {INFO_NAME}"
        )
    for split, shards in results.items():
        number = np.repeat(np.arange(len(shards), dtype=np.int32), [len(found) for found, _, _ in shards])
        manifest = with_split(
            manifest,
            split,
            dest / f"{dest.resolve().name}-{split}.samples.npz",
            {name: rows[split][name] for name in ROW.names or ()} | {"shard": number},
            classes=classes,
            shards=[shard for _, _, shard in shards],
            rejected=rejected[split],
            built={"source": "shards in place", "pillow": PIL.__version__},
        )
    assert manifest is not None
    publish(manifest, dest)


def index_shard(job: Job) -> Indexed:
    """Index one shard; write a missing index."""
    samples = list(samples_in(job.tar))
    if all(sample.fault == STRAY for sample in samples):
        raise DataError(f"{job.tar} holds no samples; take it out of the folder")
    text = index_text(samples)
    if not job.idx.exists():
        write_atomically(job.idx, text.encode())
    elif job.idx.read_bytes() != text.encode():
        raise DataError(f"{job.idx} is not the index of {job.tar.name}; remove it and it will be made again")
    rows, rejected = [], []
    with job.tar.open("rb") as stream:
        for sample in samples:
            row = row_of(sample, stream)
            if isinstance(row, Rejected):
                rejected.append(Reject(name=f"{job.tar.name}:{sample.key}", reason=row.reason))
            else:
                rows.append(row)
    record = Shard(samples=len(rows), tar=file_of(job.tar, job.name), idx=file_of(job.idx, job.idx_name))
    return np.array(rows, ROW), rejected, record


def row_of(sample: Sample, shard: IO[bytes], *, decode: bool = True) -> tuple[int, ...] | Rejected:
    """Return a sample's values of ROW, without a decoded size if that is not wanted, or why it cannot be used."""
    image, class_id = sample.image(), Labels().of(sample, ("cls",))
    if isinstance(image, Rejected):
        return image
    if isinstance(class_id, Rejected):
        return class_id
    if not class_id.isdigit():
        return Rejected(f"its label is no number (build a dataset from the shards): {class_id[:40]!r}")
    assert isinstance(image.content, Extent)
    data = image.content.read(shard)
    row = (int(class_id), image.offset, image.size, zlib.crc32(data))
    size = size_as_it_is(data) if decode else ()
    return size if isinstance(size, Rejected) else (*row, *size)
