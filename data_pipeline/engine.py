"""Runs a DALI graph on prepared batches, some of them ahead of the one that is asked for."""

import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline import graph
from data_pipeline.batch import BadSample
from data_pipeline.draws import Params
from data_pipeline.gpu_memory import gpu_memory_is_full
from data_pipeline.store import hanging_read
from data_pipeline.transforms import InputConfig

HANGS_S = 60.0
"""A read that takes so many seconds is reported while a batch waits for it, again and again."""


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

    planned: Rows
    """The rows as the order has them."""
    rows: Rows
    """The rows with bad samples replaced."""
    labels: NDArray[np.int64]
    jpegs: list[NDArray[np.uint8]]
    params: Params
    bad: list[BadSample] = field(default_factory=list)


class Preparer(Protocol):
    """Reads and draws what micro-batches need."""

    def prepare(self, rows: Rows) -> Prepared:
        """Return the batch, ready for the graph; called in threads."""

    def condemn(self, sample: int, reason: str) -> None:
        """Treat a sample as bad from now on."""


class Over(Protocol):
    """What ``torch.cuda.Event`` tells of the work before it."""

    def query(self) -> bool:
        """Whether it is over."""

    def synchronize(self) -> None:
        """Wait for it."""


class Lent:
    """DALI's batches that a GPU has still to copy from.

    DALI orders the reuse of a batch's memory behind its own work only, even if the batch is bound to another stream
    (its ``Executor2::Outputs`` pops outputs without setting their order). Let go before the copy is done, it would be
    filled with another batch's pixels, as that copy may be queued behind a whole step of training.
    """

    def __init__(self) -> None:
        self._held: deque[tuple[Over, object]] = deque()

    def until(self, event: Over, batch: object) -> None:
        """Hold a batch until the event is over; let go of those whose event is."""
        self._held.append((event, batch))
        while self._held and self._held[0][0].query():
            self._held.popleft()

    def settle(self) -> None:
        """Wait for all events and let go of everything."""
        while self._held:
            self._held.popleft()[0].synchronize()


class Engine:
    """Keeps `prefetch` micro-batches being read and as many being decoded.

    Reading happens in threads (it waits for disks), decoding in DALI. Nothing here has a state that a restart would
    need. A picture that passes the screen but not the decoder costs DALI the whole pipeline: it is then found by
    decoding one by one, condemned, and the batches on their way are prepared again without it.
    """

    def __init__(
        self,
        config: InputConfig,
        preparer: Preparer,
        *,
        train: bool,
        batch_size: int,
        threads: int,
        device: torch.device,
    ) -> None:
        self._config, self._device, self._preparer, self._depth = config, device, preparer, config.prefetch
        self._device_id = None if device.type == "cpu" else device.index or 0
        self._plan: Iterator[Rows] = iter(())
        self._reading: deque[tuple[Rows, Future[Prepared]]] = deque()
        self._decoding: deque[Prepared] = deque()
        self._copied = Lent()
        self._runs = 0
        self._build = partial(
            graph.pipeline,
            config,
            self._source,
            train=train,
            batch_size=batch_size,
            threads=threads,
            device_id=self._device_id,
        )
        self._pipe: Any = self._build()  # None when closed
        self._readers = ThreadPoolExecutor(config.prefetch, thread_name_prefix="data-reader")

    def run(self, plan: Iterator[Rows]) -> Iterator[tuple[Prepared, torch.Tensor]]:
        """Yield each planned micro-batch with its pictures, (m, 3, H, W) on the device; ends an earlier run."""
        self._stop()
        self._runs += 1
        current, self._plan = self._runs, plan
        try:
            self._start()
            while self._decoding:
                try:
                    images = self._take()
                    prepared = self._decoding.popleft()
                    self._pipe.schedule_run()  # before the batch is used, so that DALI works meanwhile
                except RuntimeError as error:
                    self._recover(error)
                    continue
                yield prepared, images
                if self._runs != current:
                    raise RuntimeError("another iteration of this loader was begun; go on with that one")
        finally:
            if self._runs == current and not sys.is_finalizing():  # then DALI has ended before us
                self._stop()

    def close(self) -> None:
        """End the threads and free what DALI holds."""
        self._stop()
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._pipe = None

    def _start(self) -> None:
        self._read_ahead()
        self._pipe.schedule_run()

    def _source(self, names: list[str]) -> list[Any]:
        """Give DALI the next batch; called by it from schedule_run, first for as many batches as it prefetches."""
        if not self._reading:
            raise StopIteration
        reading = self._reading.popleft()[1]
        while not wait([reading], HANGS_S).done:
            if found := hanging_read(HANGS_S):
                print(f"WARNING waiting for data: {found}", file=sys.stderr)  # noqa: T201
        prepared = reading.result()
        self._read_ahead()
        self._decoding.append(prepared)
        return [prepared.jpegs if name == "jpeg" else prepared.params[name] for name in names]

    def _read_ahead(self) -> None:
        while len(self._reading) < self._depth:
            rows = next(self._plan, None)
            if rows is None:
                return
            self._reading.append((rows, self._readers.submit(self._preparer.prepare, rows)))

    def _take(self) -> torch.Tensor:
        if self._device.type == "cpu":
            (output,) = self._pipe.share_outputs()
            # No copy: DALI's dynamic executor gives a batch its own memory, which lives as long as this view of it.
            images = torch.from_numpy(np.asarray(output.as_tensor()))
        else:
            # Bound to torch's stream, where the copy waits for the decoding and the host for neither.
            stream = torch.cuda.current_stream(self._device)
            (output,) = self._pipe.share_outputs(stream)
            images = torch.utils.dlpack.from_dlpack(output.as_tensor()).clone()
            self._copied.until(stream.record_event(), output)
        self._pipe.release_outputs()
        return images

    def _recover(self, error: RuntimeError) -> None:
        """Condemn the samples that DALI cannot decode and begin again at the first batch that was not yielded."""
        if gpu_memory_is_full(error):  # which says nothing about a picture
            raise error
        suspects = {
            int(sample): (jpeg, prepared.params["start"][row], prepared.params["shape"][row])
            for prepared in self._decoding
            for row, (sample, jpeg) in enumerate(zip(prepared.rows.sample_ids, prepared.jpegs, strict=True))
        }
        alone = graph.SingleDecoder(self._config, self._device_id)
        reasons = {sample: alone.why_not(*inputs) for sample, inputs in suspects.items()}
        guilty = {sample: reason for sample, reason in reasons.items() if reason}
        if not guilty or len(guilty) == len(suspects):
            raise error  # not the fault of a picture
        for sample, reason in guilty.items():
            self._preparer.condemn(sample, reason)
        again = [prepared.planned for prepared in self._decoding] + [rows for rows, _ in self._reading]
        self._plan = chain(again, self._plan)
        self._reading.clear()
        self._decoding.clear()
        self._pipe = self._build()
        self._start()

    def _stop(self) -> None:
        """Throw away what is on its way and make the pipeline ready for another run."""
        self._plan = iter(())
        while self._reading:
            self._reading.popleft()[1].cancel()
        self._decoding.clear()
        self._copied.settle()
        if self._pipe is None:
            return
        try:
            while not self._pipe.empty():
                self._pipe.share_outputs()
                self._pipe.release_outputs()
            self._pipe.schedule_run()  # finds no batch: the end, after which DALI can be reset
            self._pipe.reset()
        except RuntimeError:  # it failed on a batch that nobody will see
            self._pipe = self._build()
