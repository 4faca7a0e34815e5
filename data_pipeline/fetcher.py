"""Fetches the shards of a remote dataset before they are read."""

import math
import threading

from data_pipeline.dataset import Dataset
from data_pipeline.errors import DataError
from data_pipeline.store import RemoteStore


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
        self._capacity = dataset.store.limit // largest - 1
        self._wanted: tuple[int, ...] = ()
        self._done: tuple[int, ...] = ()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="data-fetcher", daemon=True)
        self._thread.start()

    def want(self, shards: list[int]) -> None:
        """Say which shards are read next, the most urgent first; what was wanted before is forgotten."""
        wanted = tuple(shards[: max(self._capacity, 1)])
        with self._changed:
            if wanted != self._wanted:
                self._wanted = wanted
                self._changed.notify()

    def close(self) -> None:
        """End the thread; a fetch that is under way ends with the process or by itself."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._wanted != self._done)
                if self._closed:
                    return
                wanted = self._wanted
            for shard in wanted:
                if self._closed or self._wanted != wanted:
                    break
                try:
                    self._dataset.shard_path(shard)
                except DataError:
                    break  # reading the shard raises it
            if self._wanted == wanted:
                self._done = wanted
