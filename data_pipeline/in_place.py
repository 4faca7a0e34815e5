"""Shards that others made, with `jpg` and `cls` members: an index, a table and dataset.json beside them, nothing moved.

Every picture is fully decoded. What does not decode, has 16 bits per channel or more than MAX_PIXELS, and every sample
without exactly one picture and one label, is left out of the table and listed in dataset.json.
"""

import io
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray

from data_pipeline.assemble import save_table
from data_pipeline.errors import DataError
from data_pipeline.files import write_atomically
from data_pipeline.index import Sample, scan
from data_pipeline.manifest import FILE_NAME, Manifest, Reject, Shard, Split, file_of
from data_pipeline.normalise import Rejected, decoded_size
from data_pipeline.shards import CLS_WIDTH, crc32, index_text
from data_pipeline.workers import Advance, run_all

_PICTURES = ("jpg", "jpeg")
_COLUMNS = ("label", "offset", "length", "width", "height", "crc32")
_TYPES = (np.int32, np.int64, np.int32, np.uint16, np.uint16, np.uint32)


def index_in_place(paths: Sequence[Path], dest: Path, split: str, pool: Executor, advance: Advance) -> Split:
    """Index the shards, which must lie in `dest`, and add the split to dataset.json there.

    Raises:
        DataError: a shard is damaged, an index is not its own, or nothing can be used.
    """
    manifest = Manifest.read(dest) if (dest / FILE_NAME).exists() else None
    if manifest is not None and split in manifest.splits:
        raise DataError(f"{dest} already holds a split '{split}'; name another with --split, or remove {FILE_NAME}")
    results = {}
    for path, result in run_all(pool, index_shard, paths, len(paths)):
        results[path] = result
        advance(1)
    shards, rejected, rows = [], [], []
    for number, path in enumerate(paths):
        table, rejects, shard = results[path]
        rejected += rejects
        shards.append(shard)
        rows.append(np.column_stack([table, np.full(len(table), number)]))
    table = np.concatenate(rows)
    if not len(table):
        raise DataError(f"no sample of {paths[0]} and its like can be used; the first: {rejected[0].reason}")
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
        shards=shards,
        table=file_of(table_path),
        rejected=rejected,
        built={"source": "shards in place", "pillow": PIL.__version__},
    )
    names = list(manifest.class_names) if manifest else classes
    splits = (manifest.splits if manifest else {}) | {split: entry}
    Manifest(name=dest.resolve().name, class_ids=classes, class_names=names, splits=splits).write(dest)
    return entry


def index_shard(path: Path) -> tuple[NDArray[np.int64], list[Reject], Shard]:
    """Return a shard's rows of the table (n, 6), what was left out, and its record; write its index if it has none."""
    samples = scan(path)
    if not samples:
        raise DataError(f"{path} holds no samples; take it out of the folder")
    idx = path.with_suffix(".idx")
    text = index_text(sample.line for sample in samples)
    if not idx.exists():
        write_atomically(idx, text.encode())
    elif idx.read_text() != text:
        raise DataError(f"{idx} is not the index of {path.name}; remove it and it will be made again")
    rows, rejected, keys = [], [], set()
    with path.open("rb") as stream:
        for sample in samples:
            row = Rejected("its members do not stand together") if sample.key in keys else _row(sample, stream)
            keys.add(sample.key)
            if isinstance(row, Rejected):
                rejected.append(Reject(name=f"{path.name}:{sample.key}", reason=row.reason))
            else:
                rows.append(row)
    record = Shard(samples=len(rows), tar=file_of(path), idx=file_of(idx))
    return np.array(rows, np.int64).reshape(len(rows), len(_COLUMNS)), rejected, record


def _row(sample: Sample, stream: io.BufferedReader) -> tuple[int, ...] | Rejected:
    picture, label = sample.member(*_PICTURES), sample.member("cls")
    if picture is None or label is None:
        return Rejected("it needs one jpg and one cls member, but has " + ", ".join(m.name for m in sample.members))
    stream.seek(label.offset)
    text = stream.read(label.size).strip()
    if not text.isdigit() or len(text) > CLS_WIDTH:
        return Rejected(f"its label is {text[:20]!r}, not a number of at most {CLS_WIDTH} digits")
    stream.seek(picture.offset)
    data = stream.read(picture.size)
    size = decoded_size(data)
    if isinstance(size, Rejected):
        return size
    return (int(text), picture.offset, picture.size, *size, crc32(data))
