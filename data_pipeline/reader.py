"""From sample ids to the bytes of pictures, with a screen that no damaged sample passes."""

import os
import threading
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dataset import Dataset
from data_pipeline.errors import DataError
from data_pipeline.shards import crc32, header_size

_OPEN_SHARDS = 256


class Reader:
    """Reads samples of a dataset; may be used by several threads."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.condemned: dict[int, str] = {}
        """Samples that passed the screen but not the decoder, with the reason."""
        self._files: OrderedDict[int, int] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, sample: int) -> tuple[NDArray[np.uint8], str]:
        """Return a sample's bytes, and why they cannot be used ('' when they can).

        Raises:
            DataError: the shard itself cannot be read.
        """
        data = self._bytes(sample)
        if sample in self.condemned:
            reason = self.condemned[sample]
        elif len(data) != self.dataset.length[sample]:
            reason = f"the shard ends after {len(data)} of its {self.dataset.length[sample]} bytes"
        elif crc32(data) != self.dataset.crc32[sample]:
            reason = "its checksum differs from the one taken when the shards were built"
        elif not self._fits(sample, header_size(data)):
            reason = "its header is not that of a JPEG or PNG of the size in the table"
        else:
            reason = ""
        return np.frombuffer(data, np.uint8), reason

    def _fits(self, sample: int, size: tuple[int, int] | None) -> bool:
        """Whether a header agrees with the table, which has the sides as they are after an EXIF rotation."""
        expected = (int(self.dataset.width[sample]), int(self.dataset.height[sample]))
        return size is not None and size in {expected, expected[::-1]}

    def _bytes(self, sample: int) -> bytes:
        dataset = self.dataset
        shard = int(dataset.shard[sample])
        try:
            with self._lock:  # a descriptor must not be closed while another thread reads from it
                descriptor = self._descriptor(shard)
                duplicate = os.dup(descriptor)
            try:
                return os.pread(duplicate, int(dataset.length[sample]), int(dataset.offset[sample]))
            finally:
                os.close(duplicate)
        except OSError as error:
            raise DataError(
                f"{dataset.where(shard)} cannot be read ({error.strerror}); mend the disk or copy it again"
            ) from None

    def _descriptor(self, shard: int) -> int:
        while shard not in self._files:
            try:
                self._files[shard] = os.open(self.dataset.shard_path(shard), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                if not self.dataset.store.remote:
                    raise
                continue  # another process dropped it from the cache just now: it is fetched again
            if len(self._files) > _OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(shard)
        return self._files[shard]

    def close(self) -> None:
        """Close all shards."""
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])
