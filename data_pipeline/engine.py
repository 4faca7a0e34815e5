"""Runs a DALI graph on prepared batches, some of them ahead of the one that is asked for."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline import graph
from data_pipeline.batch import BadSample
from data_pipeline.draws import Params
from data_pipeline.transforms import InputConfig


@dataclass(frozen=True)
class Rows:
    """What stands in the rows of a micro-batch; every array is (m,)."""

    sample_ids: NDArray[np.int64]
    epochs: NDArray[np.int64]
    rows: NDArray[np.int64]
    valid: NDArray[np.bool_]


@dataclass(frozen=True)
class Prepared:
    """A micro-batch with all that the graph needs."""

    rows: Rows
    labels: NDArray[np.int64]
    jpegs: list[NDArray[np.uint8]]
    params: Params
    bad: list[BadSample] = field(default_factory=list)


class Prepare(Protocol):
    """Reads and draws what a micro-batch needs; called in a thread."""

    def __call__(self, rows: Rows) -> Prepared:
        """Return the batch, ready for the graph."""


class Engine:
    """Keeps `prefetch` micro-batches being read and as many being decoded.

    Reading happens in threads (it waits for disks), decoding in DALI. Nothing here has a state that a restart would
    need.
    """

    def __init__(
        self, config: InputConfig, prepare: Prepare, *, train: bool, batch_size: int, threads: int, device: torch.device
    ) -> None:
        self._device, self._prepare, self._depth = device, prepare, config.prefetch
        device_id = None if device.type == "cpu" else device.index or 0
        self._plan: Iterator[Rows] = iter(())
        self._readers = ThreadPoolExecutor(config.prefetch, thread_name_prefix="data-reader")
        self._reading: deque[Future[Prepared]] = deque()
        self._decoding: deque[Prepared] = deque()
        self._pipe = graph.pipeline(
            config, self._source, train=train, batch_size=batch_size, threads=threads, device_id=device_id
        )

    def run(self, plan: Iterator[Rows]) -> Iterator[tuple[Prepared, torch.Tensor]]:
        """Yield each planned micro-batch with its pictures, (m, 3, H, W) float32 on the device."""
        self._stop()  # an earlier run that was not read to its end
        self._plan = plan
        try:
            self._read_ahead()
            self._pipe.schedule_run()
            while self._decoding:
                images = self._take()
                prepared = self._decoding.popleft()
                self._pipe.schedule_run()  # before the batch is used, so that DALI works meanwhile
                yield prepared, images
        finally:
            self._stop()

    def close(self) -> None:
        """End the threads and free what DALI holds."""
        self._stop()
        self._readers.shutdown(wait=True, cancel_futures=True)
        del self._pipe

    def _source(self, names: list[str]) -> list[Any]:
        """Give DALI the next batch; called by it from schedule_run, first for as many batches as it prefetches."""
        if not self._reading:
            raise StopIteration
        prepared = self._reading.popleft().result()
        self._read_ahead()
        self._decoding.append(prepared)
        return [prepared.jpegs if name == "jpeg" else prepared.params[name] for name in names]

    def _read_ahead(self) -> None:
        while len(self._reading) < self._depth:
            rows = next(self._plan, None)
            if rows is None:
                return
            self._reading.append(self._readers.submit(self._prepare, rows))

    def _take(self) -> torch.Tensor:
        if self._device.type == "cpu":
            (output,) = self._pipe.share_outputs()
            # No copy: DALI's dynamic executor gives a batch its own memory, which lives as long as this view of it.
            images = torch.from_numpy(np.asarray(output.as_tensor()))
        else:
            # Bound to torch's stream: the copy is queued behind the decoding, and a later use of the buffer behind it.
            (output,) = self._pipe.share_outputs(torch.cuda.current_stream(self._device))
            images = torch.utils.dlpack.from_dlpack(output.as_tensor()).clone()
        self._pipe.release_outputs()
        return images

    def _stop(self) -> None:
        """Throw away what is on its way and make the pipeline ready for another run."""
        self._plan = iter(())
        while self._reading:
            self._reading.popleft().cancel()
        while not self._pipe.empty():
            self._pipe.share_outputs()
            self._pipe.release_outputs()
        self._decoding.clear()
        self._pipe.schedule_run()  # finds no batch: the end, after which DALI can be reset
        self._pipe.reset()
