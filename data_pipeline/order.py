"""The order of training: a pure function from the position in the stream to the sample.

Position p is the number of samples seen since the start of training; its epoch is p // N, so that batches cross the
boundary of an epoch and no tail is lost. Within an epoch:

1. The shards have one order that depends on the seed alone. It is cut into `lanes`, so that a lane keeps its shards
   from epoch to epoch (as the canonical nodes of MosaicML streaming); only the cuts move, by less than a global batch.
2. Each lane permutes its shards again in every epoch, and permutes the samples of `window` shards at a time.
3. Position p belongs to lane (p // lane_block) % lanes: with lane_block = global batch / lanes, the rows of a global
   batch that a node holds always come from the same lanes.

Nothing is stored but the sizes of the shards and their order in the epochs in use.
"""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.philox import permutation, shuffled

Int64 = NDArray[np.int64]
_SHARDS, _PIECES, _SAMPLES = 1, 2, 3
_KEPT = 2  # epochs: a batch may hold the end of one and the beginning of the next


@dataclass(frozen=True)
class _Lane:
    """One lane in one epoch: pieces of shards in the order of reading, grouped into windows."""

    first: Int64
    """(pieces,) id of each piece's first sample."""
    start: Int64
    """(pieces + 1,) position in the lane at which each piece starts."""
    window_start: Int64
    """(windows + 1,) position in the lane at which each window starts."""


class Order:
    """Which sample is at which position.

    Args:
        shard_sizes: number of samples of each shard; sample ids count through the shards.
        seed: the run's seed.
        window: shards whose samples are shuffled together.
        lanes: parts that the order is cut into.
        lane_block: consecutive positions that belong to one lane; only matters with more than one lane.

    Raises:
        ValueError: there is no sample, or window, lanes or lane_block is not positive.
    """

    def __init__(self, shard_sizes: Int64, seed: int, window: int = 16, lanes: int = 1, lane_block: int = 1) -> None:
        sizes = np.asarray(shard_sizes, np.int64)
        if sizes.sum() < 1 or sizes.min() < 0:
            raise ValueError("an order needs at least one sample, and no shard of negative size")
        if min(window, lanes, lane_block) < 1:
            raise ValueError(f"window, lanes and lane_block must be positive: {window}, {lanes}, {lane_block}")
        self.num_samples = int(sizes.sum())
        self._seed, self._window, self._lanes, self._block = seed, window, lanes, lane_block
        fixed = permutation(len(sizes), seed, _SHARDS)
        self._shard_first = (np.cumsum(sizes) - sizes)[fixed]
        self._shard_start = np.concatenate([[0], np.cumsum(sizes[fixed])])
        self._lane_cache: OrderedDict[tuple[int, int], _Lane] = OrderedDict()

    def samples(self, start: int, stop: int) -> tuple[Int64, Int64]:
        """Return (epochs, ids) of the positions start..stop-1, each (stop - start,) int64."""
        return self.at(np.arange(start, stop, dtype=np.int64))

    def at(self, positions: Int64) -> tuple[Int64, Int64]:
        """Return (epochs, ids) of any positions, each of the shape (n,) of `positions`."""
        epochs = positions // self.num_samples
        lanes = positions // self._block % self._lanes
        ids = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            for lane in np.unique(lanes[epochs == epoch]).tolist():
                mask = (epochs == epoch) & (lanes == lane)
                begin = self._seen(np.int64(epoch * self.num_samples), lane)
                ids[mask] = self._in_lane(epoch, lane, self._seen(positions[mask], lane) - begin)
        return epochs, ids

    def shards_ahead(self, position: int, count: int) -> Int64:
        """Return the ids of the first samples of the next shards to be read, for prefetching.

        Args:
            position: of reading.
            count: how many pieces of shards to name, beginning with the window of `position`.
        """
        epoch, lane = position // self.num_samples, position // self._block % self._lanes
        plan = self._lane(epoch, lane)
        at = int(self._seen(np.int64(position), lane) - self._seen(np.int64(epoch * self.num_samples), lane))
        window = int(np.searchsorted(plan.window_start, at, side="right")) - 1
        return plan.first[window * self._window :][:count]

    def _seen(self, positions: Int64 | np.int64, lane: int) -> Int64:
        """Count the positions below each of `positions` that belong to the lane."""
        cycles, rest = np.divmod(positions, self._block * self._lanes)
        return np.asarray(cycles * self._block + np.clip(rest - lane * self._block, 0, self._block), np.int64)

    def _before(self, lane: int, position: int) -> int:
        """Count the positions below `position` that belong to lanes before `lane`."""
        cycles, rest = divmod(position, self._block * self._lanes)
        return cycles * self._block * lane + min(rest, self._block * lane)

    def _in_lane(self, epoch: int, lane: int, at: Int64) -> Int64:
        plan = self._lane(epoch, lane)
        windows = np.searchsorted(plan.window_start, at, side="right") - 1
        for window in np.unique(windows).tolist():
            mask = windows == window
            begin, end = plan.window_start[window : window + 2].tolist()
            # One word of the counter names both: lanes stay below 2**12, windows of a lane below 2**20.
            where = (_SAMPLES, epoch, lane << 20 | window)
            at[mask] = begin + shuffled(at[mask] - begin, end - begin, self._seed, *where)
        pieces = np.searchsorted(plan.start, at, side="right") - 1
        return plan.first[pieces] + at - plan.start[pieces]

    def _lane(self, epoch: int, lane: int) -> _Lane:
        key = (epoch, lane)
        if key not in self._lane_cache:
            n = self.num_samples
            # How many positions of this epoch fall to the lanes before decides where the fixed order of shards is cut.
            low, high = (self._before(lane + i, (epoch + 1) * n) - self._before(lane + i, epoch * n) for i in (0, 1))
            begin = np.maximum(self._shard_start[:-1], low)
            length = np.minimum(self._shard_start[1:], high) - begin
            inside = np.flatnonzero(length > 0)
            pieces = inside[permutation(len(inside), self._seed, _PIECES, epoch, lane)]
            start = np.concatenate([[0], np.cumsum(length[pieces])])
            window_start = np.append(start[:-1][:: self._window], start[-1])
            first = self._shard_first[pieces] + begin[pieces] - self._shard_start[pieces]
            self._lane_cache[key] = _Lane(first, start, window_start)
            if len(self._lane_cache) > _KEPT * self._lanes:
                self._lane_cache.popitem(last=False)
        return self._lane_cache[key]
