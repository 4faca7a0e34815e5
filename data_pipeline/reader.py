"""From sample ids to the bytes of images, with a screen that no damaged sample passes."""

import os
import threading
import zlib
from collections import OrderedDict
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dataset import Dataset
from data_pipeline.errors import DataError
from data_pipeline.store import patiently

_OPEN_SHARDS = 256


class Reader:
    """Reads samples of a dataset; may be used by several threads."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.bad_samples: dict[int, str] = {}
        """Samples that passed the screen but not the decoder, with the reason."""
        self._files: OrderedDict[int, int] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, sample: int) -> tuple[NDArray[np.uint8], str]:
        """Return a sample's bytes, and why they cannot be used ('' when they can).

        Raises:
            DataError: the shard itself cannot be read.
            StorageError: it cannot be read now, also after all pauses.
        """
        data = self._bytes(sample)
        if sample in self.bad_samples:
            reason = self.bad_samples[sample]
        elif len(data) != self.dataset.length[sample]:
            reason = f"the shard ends after {len(data)} of its {self.dataset.length[sample]} bytes"
        elif zlib.crc32(data) != self.dataset.crc32[sample]:
            reason = "its checksum differs from the one taken when the shards were built"
        else:
            reason = ""
        return np.frombuffer(data, np.uint8), reason

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
