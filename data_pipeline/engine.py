"""Runs a DALI graph on prepared batches, some of them ahead of the one that is asked for."""

import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from typing import Any

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
    """The samples in the rows of a micro-batch; every array is (m,)."""

    sample_ids: NDArray[np.int64]
    epochs: NDArray[np.int64]
    rows: NDArray[np.int64]
    valid: NDArray[np.bool_]
    step: int = 0
    """Global batches of the plan before this one's."""


@dataclass
class Prepared:
    """A micro-batch with all that the graph needs."""

    planned: Rows
    """The rows as the order has them."""
    rows: Rows
    """The rows with bad samples replaced."""
    labels: NDArray[np.int64]
    jpegs: list[NDArray[np.uint8]]
    params: Params
    bad: list[BadSample]
    drawn: Any
    digest: int
    inputs: dict[str, Any] = field(init=False)
    """What DALI reads in place, by name; it owns the memory."""

    def __post_init__(self) -> None:
        arrays: dict[str, Any] = {"jpeg": self.jpegs, **self.params}
        self.inputs = {name: graph.in_place(values) for name, values in arrays.items()}


class InFlightBuffers:
    """Memory that work queued on a GPU still reads: DALI's outputs, and the inputs that they were decoded from.

    DALI orders the reuse of an output's memory behind its own work only, even if the output is bound to another stream
    (its ``Executor2::Outputs`` pops outputs without setting their order). Released before the copy is done, it would be
    filled with another batch's pixels, as that copy may be queued behind a whole step of training. Inputs in pageable
    memory DALI releases as soon as an operator has queued its work.
    """

    def __init__(self) -> None:
        self._held: deque[tuple[torch.cuda.Event, object]] = deque()

    def hold(self, event: torch.cuda.Event, buffers: object) -> None:
        """Keep buffers alive until the event has passed; release those whose event has."""
        self._held.append((event, buffers))
        while self._held and self._held[0][0].query():
            self._held.popleft()

    def wait(self) -> None:
        """Wait for all events and release everything."""
        while self._held:
            self._held.popleft()[0].synchronize()


class Engine:
    """Keeps `prefetch` micro-batches being read and as many being decoded.

    Reading happens in threads (it waits for disks), decoding in DALI. Nothing here has a state that a restart would
    need. An image that passes the screen but not the decoder costs DALI the whole pipeline: it is then found by
    decoding one by one, marked as bad, and the batches on their way are prepared again without it.

    DALI reads the inputs of a batch in place (``no_copy``). It has a reference of its own to each, which it drops as
    soon as the last operator that reads the input returns; on a GPU that work is then only queued. So the engine keeps
    the inputs until the batch's output is there, on a GPU until its event has passed, and of a pipeline that failed
    until it is shut down. So DALI's are never the last ones, for which it would take the GIL, image by image.

    `prepare` reads and draws what a micro-batch needs, in threads; `mark_bad` is called with a sample that cannot be
    decoded, and why.
    """

    def __init__(
        self,
        config: InputConfig,
        *,
        prepare: Callable[[Rows], Prepared],
        mark_bad: Callable[[int, str], None],
        train: bool,
        batch_size: int,
        threads: int,
        device: torch.device,
    ) -> None:
        self._config, self._device, self._depth = config, device, config.prefetch
        self._prepare, self._mark_bad = prepare, mark_bad
        self._device_id = None if device.type == "cpu" else device.index or 0
        self._plan: Iterator[Rows] = iter(())
        self._reading: deque[tuple[Rows, Future[Prepared]]] = deque()
        self._decoding: deque[Prepared] = deque()
        self._in_flight = InFlightBuffers()
        self._runs = 0
        self._build = partial(
            graph.pipeline, config, self._source, train=train, batch_size=batch_size, threads=threads,
            device_id=self._device_id,
        )  # fmt: skip
        self._pipe: Any = self._build()  # None when closed, or while it cannot be built again
        self._readers = ThreadPoolExecutor(config.prefetch, thread_name_prefix="data-reader")

    def run(self, plan: Iterator[Rows]) -> Iterator[tuple[Prepared, torch.Tensor]]:
        """Yield each planned micro-batch with its images, (m, 3, H, W) on the device; ends an earlier run."""
        self._stop()
        self._runs += 1
        current, self._plan = self._runs, plan
        try:
            self._start()
            while self._decoding:
                try:
                    images = self._take()
                except RuntimeError as error:
                    self._recover(error)
                    continue
                prepared, failed = self._decoding.popleft(), None
                try:
                    self._pipe.schedule_run()  # before the batch is used, so that DALI works meanwhile
                except RuntimeError as error:
                    failed = error  # of a later batch: this one is not lost
                yield prepared, images
                if self._runs != current:
                    raise RuntimeError("another iteration of this loader has started; continue with that one")
                if failed is not None:
                    self._recover(failed)
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

    def _source(self) -> dict[str, Any]:
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
        return prepared.inputs

    def _read_ahead(self) -> None:
        for rows in islice(self._plan, self._depth - len(self._reading)):
            self._reading.append((rows, self._readers.submit(self._prepare, rows)))

    def _take(self) -> torch.Tensor:
        if self._device.type == "cpu":
            (output,) = self._pipe.share_outputs()
            # No copy: DALI's dynamic executor gives a batch its own memory, which is kept as long as this view of it.
            images = torch.from_numpy(np.asarray(output.as_tensor()))
        else:
            # Bound to torch's stream, where the copy waits for the decoding and the host for neither.
            stream = torch.cuda.current_stream(self._device)
            (output,) = self._pipe.share_outputs(stream)
            images = torch.utils.dlpack.from_dlpack(output.as_tensor()).clone()
            # Holding the inputs, too, was not run on a GPU so far.
            self._in_flight.hold(stream.record_event(), (output, self._decoding[0]))
        self._pipe.release_outputs()
        return images

    def _recover(self, error: RuntimeError) -> None:
        """Mark the samples that DALI cannot decode as bad and begin again at the first batch that was not yielded."""
        if gpu_memory_is_full(error):  # which says nothing about an image
            raise error
        candidates = {
            int(sample): (jpeg, prepared.params["start"][row], prepared.params["shape"][row])
            for prepared in self._decoding
            for row, (sample, jpeg) in enumerate(zip(prepared.rows.sample_ids, prepared.jpegs, strict=True))
        }
        bad = graph.undecodable(candidates, self._config, self._device_id)
        if not bad or len(bad) == len(candidates):
            raise error  # no image is the cause
        for sample, reason in bad.items():
            self._mark_bad(sample, reason)
        again = [prepared.planned for prepared in self._decoding] + [rows for rows, _ in self._reading]
        self._plan = chain(again, self._plan)
        self._reading.clear()
        self._replace()
        self._start()

    def _replace(self) -> None:
        """Build the pipeline again after an error, and release the inputs of the old one when it is shut down."""
        failed, self._pipe = self._pipe, None
        graph.shut_down(failed)
        if self._device.type == "cuda":  # not run on a GPU so far
            torch.cuda.synchronize(self._device)
        self._decoding.clear()
        self._pipe = self._build()

    def _stop(self) -> None:
        """Throw away what is on its way and make the pipeline ready for another run."""
        self._plan = iter(())
        while self._reading:
            self._reading.popleft()[1].cancel()
        self._in_flight.wait()
        if self._pipe is None:
            return
        try:
            while not self._pipe.empty():
                self._pipe.share_outputs()  # waits for the batch, also on a GPU
                self._pipe.release_outputs()
            self._pipe.schedule_run()  # finds no batch: the end, after which DALI can be reset
            self._pipe.reset()
        except RuntimeError:  # it failed on a batch that is not used
            self._replace()
        self._decoding.clear()
