"""A dataset on disk, opened for reading."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.assemble import COLUMNS
from data_pipeline.errors import DataError
from data_pipeline.manifest import FILE_NAME, Shard, Split, file_of
from data_pipeline.shards import header_at
from data_pipeline.store import CacheConfig, Store, open_store, patiently

_PROBES = 16


@dataclass(frozen=True)
class Dataset:
    """One split of a dataset. Sample ids count through the shards in their order; every array is (samples,)."""

    store: Store
    path: Path | str
    name: str
    split: str
    class_ids: tuple[str, ...]
    class_names: tuple[str, ...]
    fingerprint: str
    """Identifies the content: equal for two copies, different when a single image or label differs."""
    shards: tuple[Shard, ...]
    shard_sizes: NDArray[np.int64]
    """(shards,) samples of each shard."""
    labels: NDArray[np.int32]
    shard: NDArray[np.int32]
    """Number of the shard that holds the sample."""
    offset: NDArray[np.int64]
    """First byte of the JPEG in its shard."""
    length: NDArray[np.int32]
    """Bytes of the JPEG."""
    width: NDArray[np.uint16]
    """In pixels, as decoded (after the EXIF rotation)."""
    height: NDArray[np.uint16]
    crc32: NDArray[np.uint32]
    """Checksum of the JPEG's bytes."""

    @classmethod
    def open(
        cls, path: Path | str, split: str, cache: CacheConfig | None = None, *, check_files: bool = True
    ) -> "Dataset":
        """Open a split.

        Args:
            path: the dataset's folder, or a URL that fsspec knows.
            split: which split.
            cache: for a URL, where files are kept on local disk.
            check_files: compare the table with its checksum, and all shards with their sizes and with the table. Once
                per machine is enough.

        Raises:
            DataError: there is no such dataset or split, the table is not the one that dataset.json names, a shard is
                missing, has another size than dataset.json says or does not hold its first and last sample where the
                table says, or a label is none of the classes.
            StorageError: storage or network failed, also after all pauses.
        """
        store = open_store(path, cache)
        manifest = store.manifest()
        if split not in manifest.splits:
            there = ", ".join(f"'{name}'" for name in manifest.splits)
            raise DataError(f"{path} has no split '{split}' (there is {there}); name one of these, or build it")
        entry = manifest.splits[split]
        table = _table(store, entry, check=check_files)
        identity = hashlib.sha256("\0".join([entry.table.sha256, *manifest.class_ids]).encode()).hexdigest()
        dataset = cls(
            store=store,
            path=path,
            name=manifest.name,
            split=split,
            class_ids=tuple(manifest.class_ids),
            class_names=tuple(manifest.class_names),
            fingerprint=identity[:16],
            shards=tuple(entry.shards),
            shard_sizes=np.array([shard.samples for shard in entry.shards], np.int64),
            labels=table.pop("label"),
            **table,
        )
        dataset._check_table(entry)
        # A remote shard is compared with its checksum when it is fetched.
        if check_files and not store.remote:
            dataset._check_shards(store.folder)
        return dataset

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Number of classes; labels are smaller."""
        return len(self.class_ids)

    def shard_path(self, shard: int) -> Path:
        """Return a local path of a shard; DataError when it is remote and cannot be had."""
        return self.store.file(self.shards[shard].tar)

    def where(self, shard: int) -> str:
        """Name a shard for a message."""
        return self.store.where(self.shards[shard].tar.name)

    def sample_name(self, sample: int) -> str:
        """Return the name of a sample's member in its shard."""
        with suppress(OSError), self.shard_path(int(self.shard[sample])).open("rb") as shard:
            if header := header_at(shard, int(self.offset[sample])):
                return header.name
        return f"sample {sample}"

    def _check_table(self, entry: Split) -> None:
        if not np.array_equal(np.bincount(self.shard, minlength=len(self.shards)), self.shard_sizes):
            where = self.store.where(entry.table.name)
            raise DataError(f"{where} does not count the samples of the shards as {FILE_NAME} does; build it again")
        strange = np.flatnonzero((self.labels < 0) | (self.labels >= self.num_classes))
        if len(strange):
            sample = int(strange[0])
            raise DataError(
                f"sample {self.sample_name(sample)} in {self.where(int(self.shard[sample]))} has label "
                f"{self.labels[sample]}, but the classes are 0..{self.num_classes - 1}; "
                "fix the label or the list of classes"
            )

    def _check_shards(self, folder: Path) -> None:
        """Compare sizes, and the ends of every shard with the table: another shard may have the right size."""
        ends = np.cumsum(self.shard_sizes)

        def look(path: Path, samples: list[int]) -> tuple[int, list[int | None]]:
            """Return a file's bytes, and those of the images whose headers are where the table says."""
            size = path.stat().st_size
            if not samples:
                return size, []
            with path.open("rb") as stream:
                headers = [header_at(stream, int(self.offset[sample])) for sample in samples]
            return size, [None if header is None else header.size for header in headers]

        def check(shard: int) -> None:
            record, end = self.shards[shard], int(ends[shard])
            outer = [end - record.samples, end - 1] if record.samples else []
            for file, samples in ((record.tar, outer), (record.idx, [])):
                path = folder / file.name
                try:
                    size, lengths = patiently(partial(look, path, samples), str(path))
                except OSError as error:
                    message = f"{path}: {error.strerror}; fix the disk, copy it here or build the dataset again"
                    raise DataError(message) from None
                found = f"has {size} bytes, but {FILE_NAME} says {file.bytes}" if size != file.bytes else ""
                if not found and lengths != [int(self.length[sample]) for sample in samples]:
                    found = "does not hold its samples where the table says"
                if found:
                    raise DataError(
                        f"{path} {found}: it is not the file that was indexed; copy it again or build the dataset again"
                    )

        with ThreadPoolExecutor(_PROBES) as pool:  # it is waiting for a file server, if anything
            list(pool.map(check, range(len(self.shards))))


def _table(store: Store, entry: Split, *, check: bool) -> dict[str, NDArray]:
    path = store.file(entry.table)

    def read() -> dict[str, NDArray]:
        if check and file_of(path).sha256 != entry.table.sha256:
            raise DataError(f"{path} is not the file that {FILE_NAME} names: its checksum differs; copy it again")
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in COLUMNS}

    try:
        table = patiently(read, str(path))
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001  (zipfile and numpy raise a dozen kinds on damaged files)
        reason = str(error) or type(error).__name__
        raise DataError(f"{path} cannot be read ({reason}); copy it again or build the dataset again") from None
    if {column.shape for column in table.values()} != {(entry.samples,)}:
        raise DataError(f"{path} does not hold {entry.samples} samples as {FILE_NAME} says; build the dataset again")
    return table
