"""From sample ids to the bytes of images: shards fetched ahead, and a screen that no damaged sample passes."""

import math
import os
import threading
import zlib
from collections import OrderedDict
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dataset import Dataset
from data_pipeline.errors import DataError
from data_pipeline.store import RemoteStore, patiently

_OPEN_SHARDS = 256


class Reader:
    """Reads samples of a dataset; may be used by several threads."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self._bad: dict[int, str] = {}
        self._files: OrderedDict[int, int] = OrderedDict()
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
        shards = self.dataset.shard[samples]
        for shard in np.unique(shards).tolist():
            wanted = samples[shards == shard]
            spans = zip(self.dataset.offset[wanted].tolist(), self.dataset.length[wanted].tolist(), strict=True)
            with suppress(OSError):
                duplicate = self._duplicate(shard)
                try:
                    for offset, length in spans:
                        os.posix_fadvise(duplicate, offset, length, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(duplicate)

    def _bytes(self, sample: int) -> bytes:
        dataset = self.dataset
        shard = int(dataset.shard[sample])

        def read() -> bytes:
            duplicate = self._duplicate(shard)
            try:
                return os.pread(duplicate, int(dataset.length[sample]), int(dataset.offset[sample]))
            except OSError:
                self._forget(shard)  # a stale handle stays stale: the shard is reopened
                raise
            finally:
                os.close(duplicate)

        try:
            return patiently(read, dataset.where(shard))
        except OSError as error:
            raise DataError(
                f"{dataset.where(shard)} cannot be read ({error.strerror}); fix the disk or copy it again"
            ) from None

    def _duplicate(self, shard: int) -> int:
        while True:
            with self._lock:  # a descriptor must not be closed while another thread reads from it
                if shard in self._files:
                    self._files.move_to_end(shard)
                    return os.dup(self._files[shard])
            self._open(shard)

    def _open(self, shard: int) -> None:
        try:  # without the lock: the shard may have to be fetched
            descriptor = os.open(self.dataset.shard_path(shard), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            if not self.dataset.store.remote:
                raise
            return  # another process dropped it from the cache just now: it is fetched again
        with self._lock:
            if self._files.setdefault(shard, descriptor) != descriptor:  # another thread was faster
                os.close(descriptor)
            elif len(self._files) > _OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])

    def _forget(self, shard: int) -> None:
        with self._lock:
            if shard in self._files:
                os.close(self._files.pop(shard))

    def close(self) -> None:
        """Close all shards."""
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])


def require_room(dataset: Dataset, window: int, lanes: int) -> None:
    """Check that the cache holds what is read at a time, before the first batch.

    A smaller one would fetch the same shards again and again, and no one would know why training is slow.

    Args:
        dataset: the split that is read.
        window: shards that are shuffled together.
        lanes: lanes that this machine reads, each with a window of its own.

    Raises:
        DataError: it does not, with the gigabytes that it needs.
    """
    assert isinstance(dataset.store, RemoteStore)
    largest = sorted((shard.tar.bytes for shard in dataset.shards), reverse=True)[: window * lanes]
    if dataset.store.limit < sum(largest):
        needed = math.ceil(sum(largest) / 1e6) / 1000  # rounded up, so that it is enough
        raise DataError(
            f"the cache may hold {dataset.store.limit / 1e9:g} gigabytes, but the {len(largest)} shards that this "
            f"machine shuffles at a time ({window} in each of {lanes} lanes) need {needed:g}; set data.cache.gigabytes"
            " to at least that, preferably twice, or lower data.shuffle_window"
        )


class Fetcher:
    """A thread that fetches what is wanted next, one shard after the other, into the cache.

    It never fetches more than the cache holds. What fails here is fetched again by who reads it, and is an error there.
    """

    def __init__(self, dataset: Dataset) -> None:
        assert isinstance(dataset.store, RemoteStore)
        self._dataset = dataset
        largest = max(shard.tar.bytes for shard in dataset.shards)
        self._capacity = max(dataset.store.limit // largest - 1, 1)
        self._wanted: tuple[int, ...] | None = ()
        self._changed = threading.Condition()
        threading.Thread(target=self._work, name="data-fetcher", daemon=True).start()

    def want(self, shards: list[int]) -> None:
        """Say which shards are read next, the most urgent first; what was wanted before is forgotten."""
        self._set(tuple(shards[: self._capacity]))

    def close(self) -> None:
        """End the thread; a fetch that is under way ends with the process or by itself."""
        self._set(None)

    def _set(self, wanted: tuple[int, ...] | None) -> None:
        with self._changed:
            self._wanted = wanted
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
            for shard in wanted:
                if self._wanted != wanted:
                    break
                try:
                    self._dataset.shard_path(shard)
                except DataError:
                    break  # reading the shard raises it
            if self._wanted == wanted:
                done = wanted
