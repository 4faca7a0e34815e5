"""Batches on the device, in the order that `data_pipeline.order` states."""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import numpy as np
import torch

from data_pipeline.batch import BadSample, Batch, content_digest, to_device
from data_pipeline.dataset import Dataset
from data_pipeline.draws import Draws, Params, eval_params, train_params
from data_pipeline.engine import Engine, Prepared, Rows
from data_pipeline.errors import DataError
from data_pipeline.order import Int64, Order
from data_pipeline.reader import Fetcher, Reader
from data_pipeline.store import RemoteStore
from data_pipeline.transforms import InputConfig

__all__ = ["BadSample", "Batch", "EvalLoader", "TrainLoader"]
OnBadSample = Callable[[BadSample], None]
_REPLACEMENTS = 100
_PLANNED = 4096


class _Loader(ABC):
    """What training and evaluation share: reading, replacing what is bad, decoding."""

    _fetcher: Fetcher | None = None

    def __init__(
        self,
        dataset: Dataset,
        config: InputConfig,
        *,
        train: bool,
        batch_size: int,
        device: torch.device,
        local_ranks: int,
        on_bad_sample: OnBadSample | None,
    ) -> None:
        self._dataset, self._config, self._train, self._device = dataset, config, train, device
        self._on_bad = on_bad_sample
        self._reader = Reader(dataset)
        self._bad: set[int] = set()
        self._bad_allowed = math.ceil(config.max_bad_fraction * len(dataset))
        self._engine = Engine(
            config, prepare=self._prepare, mark_bad=self._reader.mark_bad, train=train, batch_size=batch_size,
            threads=config.threads or max(1, len(os.sched_getaffinity(0)) // local_ranks), device=device,
        )  # fmt: skip

    def close(self) -> None:
        """Stop prefetching and free the device's memory."""
        self._engine.close()
        self._reader.close()
        if self._fetcher is not None:
            self._fetcher.want(None)

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's batches; ends an iteration that was left."""
        for prepared, images in self._engine.run(self._plan()):
            for bad in prepared.bad:
                self._report(bad)
            rows, labels = prepared.rows, to_device(prepared.labels, self._device)
            yield Batch(
                images, labels, rows.sample_ids, rows.epochs, rows.rows, rows.valid, prepared.drawn, prepared.digest
            )

    @abstractmethod
    def _plan(self) -> Iterator[Rows]:
        """Yield what is in the batches."""

    @abstractmethod
    def _draw(self, rows: Rows, widths: np.ndarray, heights: np.ndarray) -> tuple[Params, Any]:
        """Return what the graph needs for images of these sizes, each (m,), and what the caller wants drawn."""

    def _prepare(self, rows: Rows) -> Prepared:
        """Read a micro-batch, replace what is bad in it, and draw what is random; called in threads."""
        seen = rows.sample_ids.copy()
        self._reader.announce(seen)
        jpegs, bad = [], []
        for row, sample in enumerate(rows.sample_ids.tolist()):
            data, reason = self._reader.read(sample)
            if reason:
                seen[row], data = self._replacement(sample)
                if rows.valid[row]:  # what only pads a batch is reported by the rank whose share it is in
                    shard = self._dataset.shards[int(self._dataset.shard[sample])].tar.name
                    bad.append(BadSample(sample, self._dataset.sample_name(sample), shard, reason, int(seen[row])))
            jpegs.append(data)
        sizes = (self._dataset.width[seen].astype(np.int64), self._dataset.height[seen].astype(np.int64))
        # Drawn for the sample that was planned, so that its replacement looks different from its own row.
        params, drawn = self._draw(rows, *sizes)
        # In evaluation the replacement of a bad sample does not count.
        valid = rows.valid if self._train else rows.valid & (seen == rows.sample_ids)
        labels = self._dataset.labels[seen].astype(np.int64)
        digest = content_digest(seen, labels, self._dataset.crc32[seen])  # the reader has compared the checksums
        return Prepared(rows, replace(rows, sample_ids=seen, valid=valid), labels, jpegs, params, bad, drawn, digest)

    def _replacement(self, sample: int) -> tuple[int, np.ndarray]:
        """Return the next good sample of the same shard: the same one whoever asks."""
        shard = int(self._dataset.shard[sample])
        size = int(self._dataset.shard_sizes[shard])
        first = int(self._dataset.shard_sizes[:shard].sum())
        for step in range(1, min(size, _REPLACEMENTS)):
            other = first + (sample - first + step) % size
            data, reason = self._reader.read(other)
            if not reason:
                return other, data
        raise DataError(
            f"{self._dataset.where(shard)}: sample {self._dataset.sample_name(sample)} and all after it "
            "are damaged; copy the shard again or build the dataset again"
        )

    def _report(self, bad: BadSample) -> None:
        self._bad.add(bad.id)
        if self._on_bad is not None:
            self._on_bad(bad)
        if len(self._bad) > self._bad_allowed:
            raise DataError(
                f"{len(self._bad)} samples of {self._dataset.path} are damaged, more than max_bad_fraction "
                f"({self._config.max_bad_fraction}) allows; the last, {bad.name} in {bad.shard}: {bad.reason}. "
                f"Run python -m data_pipeline.verify {self._dataset.path}"
            )


class TrainLoader(_Loader):
    """This rank's micro-batches, without end.

    Global batch g covers the stream positions start_sample + g * global_batch and following; rank r takes the
    contiguous rows r * global_batch / world_size and following, in micro-batches of consecutive rows. The state is
    one integer: the samples seen, from which another loader, of any world size, resumes.

    Args:
        dataset: the split to train on.
        config: how images are read, augmented and normalized.
        seed: decides the order and the augmentation.
        global_batch: samples per optimizer step over all ranks.
        micro_batch: samples per yielded batch.
        rank: this rank.
        world_size: number of ranks.
        device: where batches appear; DALI decodes there.
        start_sample: samples seen before.
        local_ranks: ranks that share this machine's cores.
        on_bad_sample: called for each sample that had to be replaced.
        draw: called for each micro-batch, in threads and ahead, with its optimizer step and its (m,) rows of the global
            batch; its result is the batch's `drawn`.
        start_step: optimizer step that `start_sample` belongs to.

    Raises:
        DataError: the global batch cannot be divided as asked, or a remote dataset's cache is too small for the shards
            that are shuffled at a time.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: InputConfig,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        device: torch.device,
        start_sample: int = 0,
        local_ranks: int = 1,
        on_bad_sample: OnBadSample | None = None,
        draw: Callable[[int, Int64], Any] | None = None,
        start_step: int = 0,
    ) -> None:
        if global_batch % (world_size * micro_batch):
            raise DataError(
                f"a global batch of {global_batch} cannot be divided among {world_size} ranks in micro-batches of "
                f"{micro_batch}; choose a multiple of {world_size * micro_batch}"
            )
        if global_batch % config.lanes:
            raise DataError(f"lanes ({config.lanes}) must divide the global batch ({global_batch}); choose other lanes")
        self._seed, self._start, self._caller, self._start_step = seed, start_sample, draw, start_step
        self._global, self._micro, self._share = global_batch, micro_batch, global_batch // world_size
        self._first_row = rank * self._share
        if isinstance(dataset.store, RemoteStore):
            # The ranks of a machine are neighbors, and share its cache.
            low = rank // local_ranks * local_ranks * self._share
            high = min(low + local_ranks * self._share, global_batch)
            block = global_batch // config.lanes
            self._fetcher = Fetcher(dataset, config.shuffle_window, (high - 1) // block - low // block + 1)
        self._ordered = (dataset.shard_sizes, seed, config.shuffle_window, config.lanes, global_batch // config.lanes)
        self._order = Order(*self._ordered)
        super().__init__(
            dataset, config, train=True, batch_size=micro_batch, device=device, local_ranks=local_ranks,
            on_bad_sample=on_bad_sample,
        )  # fmt: skip

    def samples(self, start: int, stop: int) -> tuple[Int64, Int64]:
        """Return (epochs, sample ids) of the positions start..stop-1 of training, each (stop - start,) int64."""
        return Order(*self._ordered).samples(start, stop)  # a new one: its caches are not for two threads

    def _plan(self) -> Iterator[Rows]:
        step = self._start
        share = self._first_row + np.arange(self._share)
        while True:
            # Many steps at once: the order costs less than a microsecond per sample then.
            steps = step + self._global * np.arange(max(1, _PLANNED // self._share))
            epochs, ids = self._order.at((steps[:, None] + share).reshape(-1))
            for low in range(0, len(ids), self._micro):
                if self._fetcher is not None and low % self._share == 0:
                    self._fetcher.want(self._shards_ahead(step + low // self._share * self._global))
                part, row = slice(low, low + self._micro), self._first_row + low % self._share
                rows, valid = np.arange(row, row + self._micro), np.ones(self._micro, bool)
                done = (step - self._start) // self._global + low // self._share
                yield Rows(ids[part], epochs[part], rows, valid, done)
            step += self._global * len(steps)

    def _shards_ahead(self, step: int) -> list[int]:
        """Return the shards that this rank reads next, those of its lanes one after the other."""
        block = self._global // self._config.lanes
        firsts = range(self._first_row // block * block, self._first_row + self._share, block)
        window = self._config.shuffle_window
        ahead = [self._order.shards_ahead(step + max(first, self._first_row), 2 * window) for first in firsts]
        columns = zip_longest(*(self._dataset.shard[samples].tolist() for samples in ahead))
        return [shard for column in columns for shard in column if shard is not None]

    def _draw(self, rows: Rows, widths: np.ndarray, heights: np.ndarray) -> tuple[Params, Any]:
        params = train_params(self._config, Draws(self._seed, rows.epochs, rows.sample_ids), widths, heights)
        drawn = None if self._caller is None else self._caller(self._start_step + rows.step, rows.rows)
        return params, drawn


class EvalLoader(_Loader):
    """Every sample of a split exactly once over all ranks; may be iterated again and again.

    The split is cut into batches, of which each rank takes a contiguous share: a sample is in the same row of the
    same batch whatever the number of ranks, so that a network can give it the same scores, bit for bit. All ranks yield
    the same number of batches; what is missing at the end is padded with rows whose `valid` is False. The arguments are
    as those of `TrainLoader`; `batch_size` is the number of samples in each batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: InputConfig,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        device: torch.device,
        local_ranks: int = 1,
        on_bad_sample: OnBadSample | None = None,
    ) -> None:
        super().__init__(
            dataset, config, train=False, batch_size=batch_size, device=device, local_ranks=local_ranks,
            on_bad_sample=on_bad_sample,
        )  # fmt: skip
        self._set_share(batch_size, rank, world_size)

    def _set_share(self, batch_size: int, rank: int, world_size: int) -> None:
        self._size, self._share = batch_size, -(-len(self._dataset) // (batch_size * world_size)) * batch_size
        self._first = rank * self._share

    def __len__(self) -> int:
        """Return the number of batches, equal on every rank."""
        return self._share // self._size

    def _plan(self) -> Iterator[Rows]:
        end = min(self._first + self._share, len(self._dataset))
        for batch in range(len(self)):
            ids = self._first + batch * self._size + np.arange(self._size)
            valid = ids < end
            rows = np.minimum(ids, end - 1)  # padded with neighbors, from a shard that is read anyway
            yield Rows(rows, np.zeros_like(ids), rows, valid)

    def _draw(self, rows: Rows, widths: np.ndarray, heights: np.ndarray) -> tuple[Params, Any]:  # noqa: ARG002
        return eval_params(self._config, widths, heights), None
