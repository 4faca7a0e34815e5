"""From sample ids to the bytes of images: shards fetched ahead, and a screen that no damaged sample passes."""

import math
import os
import threading
import zlib
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dataset import Dataset
from data_pipeline.errors import DataError
from data_pipeline.store import RemoteStore, patiently

_OPEN_SHARDS = 256


class _File:
    """An open shard; it is closed when no thread uses it any more."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):  # else it could not be opened
            os.close(self.descriptor)


class Reader:
    """Reads samples of a dataset; may be used by several threads."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self._bad: dict[int, str] = {}
        self._files: OrderedDict[int, _File] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, sample: int) -> tuple[NDArray[np.uint8], str]:
        """Return a sample's bytes, and why they cannot be used ('' when they can).

        Raises:
            DataError: the shard itself cannot be read.
            StorageError: it cannot be read now, also after all pauses.
        """
        data = self._bytes(sample)
        if sample in self._bad:
            reason = self._bad[sample]
        elif len(data) != self.dataset.length[sample]:
            reason = f"the shard ends after {len(data)} of its {self.dataset.length[sample]} bytes"
        elif zlib.crc32(data) != self.dataset.crc32[sample]:
            reason = "its checksum differs from the one taken when the shards were built"
        else:
            reason = ""
        return np.frombuffer(data, np.uint8), reason

    def mark_bad(self, sample: int, reason: str) -> None:
        """Treat a sample as bad from now on: it passed the screen but not the decoder."""
        self._bad[sample] = reason

    def announce(self, samples: NDArray[np.int64]) -> None:
        """Let storage bring samples, (m,), all at once; `read` alone would wait for one after the other.

        It is only a hint: what cannot be opened is reported by `read`.
        """
        dataset = self.dataset
        for sample in samples.tolist():
            with suppress(OSError):
                file = self._file(int(dataset.shard[sample]))
                place = int(dataset.offset[sample]), int(dataset.length[sample])
                os.posix_fadvise(file.descriptor, *place, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close all shards."""
        with self._lock:
            self._files.clear()

    def _bytes(self, sample: int) -> bytes:
        dataset = self.dataset
        shard = int(dataset.shard[sample])

        def read() -> bytes:
            try:
                file = self._file(shard)
                return os.pread(file.descriptor, int(dataset.length[sample]), int(dataset.offset[sample]))
            except OSError:
                with self._lock:
                    self._files.pop(shard, None)  # a stale handle stays stale: the shard is reopened
                raise

        try:
            return patiently(read, dataset.where(shard))
        except OSError as error:
            raise DataError(
                f"{dataset.where(shard)} cannot be read ({error.strerror}); fix the disk or copy it again"
            ) from None

    def _file(self, shard: int) -> _File:
        while True:
            with self._lock:
                if shard in self._files:
                    self._files.move_to_end(shard)
                    return self._files[shard]
            try:  # without the lock: the shard may have to be fetched
                opened = _File(self.dataset.shard_path(shard))
            except FileNotFoundError:
                if not self.dataset.store.remote:
                    raise
                continue  # another process dropped it from the cache just now: it is fetched again
            with self._lock:
                self._files.setdefault(shard, opened)  # another thread may have been faster
                if len(self._files) > _OPEN_SHARDS:
                    self._files.popitem(last=False)


class Fetcher:
    """A thread that fetches what is wanted next, one shard after the other, into the cache.

    It never fetches more than the cache holds. What fails here is fetched again by who reads it, and is an error there.

    Args:
        dataset: the split that is read.
        window: shards that are shuffled together.
        lanes: lanes that this machine reads, each with a window of its own.

    Raises:
        DataError: the cache does not hold what is read at a time: the same shards would be fetched again and again, and
            no one would know why training is slow.
    """

    def __init__(self, dataset: Dataset, window: int, lanes: int) -> None:
        assert isinstance(dataset.store, RemoteStore)
        limit = dataset.store.limit
        sizes = sorted((shard.tar.bytes for shard in dataset.shards), reverse=True)
        largest = sizes[: window * lanes]
        if limit < sum(largest):
            needed = math.ceil(sum(largest) / 1e6) / 1000  # rounded up, so that it is enough
            raise DataError(
                f"the cache may hold {limit / 1e9:g} gigabytes, but the {len(largest)} shards that this machine "
                f"shuffles at a time ({window} in each of {lanes} lanes) need {needed:g}; set data.cache.gigabytes "
                "to at least that, preferably twice, or lower data.shuffle_window"
            )
        self._dataset, self._capacity = dataset, max(limit // sizes[0] - 1, 1)
        self._wanted: tuple[int, ...] | None = ()
        self._changed = threading.Condition()
        threading.Thread(target=self._work, name="data-fetcher", daemon=True).start()

    def want(self, shards: list[int] | None) -> None:
        """Name the shards that are read next, the most urgent first, in place of those wanted before; None ends it.

        A fetch that is under way ends with the process or by itself.
        """
        with self._changed:
            self._wanted = None if shards is None else tuple(shards[: self._capacity])
            self._changed.notify()

    def _work(self) -> None:
        done: tuple[int, ...] = ()
        while True:
            with self._changed:
                while self._wanted == done:
                    self._changed.wait()
                wanted = self._wanted
            if wanted is None:
                return
            with suppress(DataError):  # reading the shard raises it
                for shard in wanted:
                    if self._wanted != wanted:
                        break
                    self._dataset.shard_path(shard)
            done = wanted
