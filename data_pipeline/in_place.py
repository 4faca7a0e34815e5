"""Shards that others made, used where they lie: an index, a table and dataset.json are written, the shards stay as are.

Samples must have a `cls` member with a number. Every image is fully decoded; what `data_pipeline.acceptance` does not
accept as it is, and every sample without exactly one image and one label, is left out of the table and listed in
dataset.json.
"""

import io
from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray

from data_pipeline.acceptance import Rejected, size_as_it_is
from data_pipeline.archive import entries, is_compressed
from data_pipeline.assemble import save_table
from data_pipeline.errors import DataError
from data_pipeline.files import write_atomically
from data_pipeline.index import Labels, Sample, samples_of
from data_pipeline.manifest import FILE_NAME, File, Manifest, Reject, Shard, Split, file_of, publish
from data_pipeline.shards import crc32, index_text
from data_pipeline.workers import Advance, run_all

_COLUMNS = ("label", "offset", "length", "width", "height", "crc32")
_TYPES = (np.int32, np.int64, np.int32, np.uint16, np.uint16, np.uint32)


@dataclass(frozen=True)
class Job:
    """A shard to be indexed."""

    tar: Path
    dest: Path
    """The dataset's folder."""
    beside: bool
    """Whether the index is written beside the shard; else in the dataset's folder."""

    @property
    def name(self) -> str:
        """The shard's name in dataset.json: relative to the dataset's folder if it lies in it."""
        tar, dest = self.tar.resolve(), self.dest.resolve()
        return str(tar.relative_to(dest) if tar.is_relative_to(dest) else tar)

    @property
    def idx(self) -> Path:
        """The index."""
        return (
            self.tar.with_suffix(".idx") if self.beside else self.dest / f"{self.name.strip('/').replace('/', '_')}.idx"
        )

    def files(self) -> tuple[File, File]:
        """Describe the shard and its index as dataset.json names them."""
        idx = str(Path(self.name).with_suffix(".idx")) if self.beside else self.idx.name
        return (
            file_of(self.tar).model_copy(update={"name": self.name}),
            file_of(self.idx).model_copy(update={"name": idx}),
        )


def index_in_place(
    paths: Sequence[Path], dest: Path, split: str, pool: Executor, advance: Advance, *, beside: bool = True
) -> None:
    """Index shards and add them as a split to dest/dataset.json.

    Args:
        paths: the shards, plain tar archives.
        dest: the dataset's folder.
        split: what they become.
        pool: where shards are indexed.
        advance: called for each shard that is done.
        beside: write each index beside its shard; else into `dest`.

    Raises:
        DataError: a shard is damaged, an index is not its own, or nothing can be used. No index is left behind then.
    """
    manifest = Manifest.read(dest) if (dest / FILE_NAME).exists() else None
    if manifest is not None and split in manifest.splits:
        raise DataError(f"{dest} already holds a split '{split}'; name another with --split, or remove {FILE_NAME}")
    packed = next((path for path in paths if is_compressed(path)), None)
    if packed is not None:
        raise DataError(f"{packed} is compressed and cannot be read in place; convert the shards: name another DEST")
    jobs = [Job(path, dest, beside) for path in paths]
    new = [job.idx for job in jobs if not job.idx.exists()]
    results = {}
    try:
        for job, result in run_all(pool, index_shard, jobs, len(jobs)):
            results[job.tar] = result
            advance(1)
        _added([results[path] for path in paths], manifest, dest, split)
    except BaseException:
        for path in new:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        raise


def _added(
    results: Sequence[tuple[NDArray[np.int64], list[Reject], Shard]], manifest: Manifest | None, dest: Path, split: str
) -> None:
    """Write the table and dataset.json."""
    table = np.concatenate(
        [np.column_stack([rows, np.full(len(rows), number)]) for number, (rows, _, _) in enumerate(results)]
    )
    rejected = [reject for _, rejects, _ in results for reject in rejects]
    if not len(table):
        first = rejected[0]
        raise DataError(f"no sample can be used in place; the first, {first.name}: {first.reason}")
    columns = {name: table[:, i].astype(kind) for i, (name, kind) in enumerate(zip(_COLUMNS, _TYPES, strict=True))}
    classes = list(manifest.class_ids) if manifest else [str(i) for i in range(int(columns["label"].max()) + 1)]
    if columns["label"].max() >= len(classes):
        raise DataError(
            f"the shards have label {columns['label'].max()}, but {dest / FILE_NAME} knows {len(classes)} classes; "
            "index the split with all the classes first"
        )
    prefix = f"{dest.resolve().name}-{split}"
    table_path = dest / f"{prefix}.samples.npz"
    save_table(table_path, columns | {"shard": table[:, -1].astype(np.int32)})
    entry = Split(
        samples=len(table),
        class_counts=np.bincount(columns["label"], minlength=len(classes)).tolist(),
        shards=[shard for _, _, shard in results],
        table=file_of(table_path),
        rejected=rejected,
        built={"source": "shards in place", "pillow": PIL.__version__},
    )
    names = list(manifest.class_names) if manifest else classes
    splits = (manifest.splits if manifest else {}) | {split: entry}
    publish(Manifest(name=dest.resolve().name, class_ids=classes, class_names=names, splits=splits), dest)


def index_shard(job: Job) -> tuple[NDArray[np.int64], list[Reject], Shard]:
    """Return a shard's rows of the table (n, 6), what was left out, and its record; write its index if it has none."""
    strays: list[str] = []
    samples = list(samples_of(entries(job.tar), strays))
    if not samples:
        raise DataError(f"{job.tar} holds no samples; take it out of the folder")
    text = index_text(sample.line for sample in samples)
    if not job.idx.exists():
        write_atomically(job.idx, text.encode())
    elif job.idx.read_text() != text:
        raise DataError(f"{job.idx} is not the index of {job.tar.name}; remove it and it will be made again")
    rows, rejected = [], []
    with job.tar.open("rb") as stream:
        for sample in samples:
            row = _row(sample, stream)
            if isinstance(row, Rejected):
                rejected.append(Reject(name=f"{job.tar.name}:{sample.key}", reason=row.reason))
            else:
                rows.append(row)
    rejected += [Reject(name=f"{job.tar.name}:{name}", reason="belongs to no sample") for name in strays]
    tar, idx = job.files()
    return (
        np.array(rows, np.int64).reshape(len(rows), len(_COLUMNS)),
        rejected,
        Shard(samples=len(rows), tar=tar, idx=idx),
    )


def _row(sample: Sample, stream: io.BufferedReader) -> tuple[int, ...] | Rejected:
    image, label = sample.image(), sample.member("cls")
    if isinstance(image, str):
        return Rejected(image)
    texts = {}
    if label is not None and not label.unusable:
        stream.seek(label.offset)
        texts["cls"] = stream.read(label.size)
    class_id, reason = Labels().of(sample, texts)
    if reason or not class_id.isdigit():
        return Rejected(reason or f"its label is no number (build a dataset from the shards): {class_id[:40]!r}")
    stream.seek(image.offset)
    data = stream.read(image.size)
    size = size_as_it_is(data)
    return size if isinstance(size, Rejected) else (int(class_id), image.offset, image.size, *size, crc32(data))
