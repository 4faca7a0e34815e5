"""What a run reports: lines on the console, measurements, events, ``run.json`` and the time of a start."""

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import without_secrets
from pretrain.console import RunConsole
from pretrain.evaluation.accuracy import Evaluation
from pretrain.evaluation.probes import Probed
from pretrain.fault_tolerance.spikes import Spike, write_spikes
from pretrain.files import cut_lines, fsync, lock
from pretrain.ledger import Row, is_row, write_rows
from pretrain.metrics import MetricsWriter
from pretrain.monitoring.bad_samples import BadSampleCount
from pretrain.run_folder import RunFolder
from pretrain.run_state import EventName, RunState, State, write_event, write_start
from pretrain.state import TrainState


class RunStatus:
    """Writes ``run.json`` on rank 0 (``first``), and the reason of a failure on the rank that fails first."""

    def __init__(self, folder: RunFolder, *, first: bool) -> None:
        self._folder, self._first, self._began = folder, first, time.time()
        self.run_state: RunState | None = None
        """Of this attempt, from when it has claimed the folder."""
        self.train_state: TrainState | None = None
        """Where the run is, once that is known."""

    def write(self, status: State, reason: str = "") -> None:
        """Replace ``run.json``.

        Raises:
            OSError: it cannot be written.
        """
        failed = status == "running" and self._folder.failure.exists()  # another rank has recorded why
        if self._first and self.run_state is not None and not failed:
            self.run_state.state, self.run_state.reason = status, reason
            if self.train_state is not None:
                self.run_state.step, self.run_state.samples_seen = self.train_state.step, self.train_state.samples_seen
            self._folder.write_state(self.run_state)

    def fail(self, reason: str) -> bool:
        """Record in ``run.json``, in one line, why this attempt fails; any rank may, and the first one does.

        When one rank fails the others soon do too, with reasons that follow from its own. ``failure.txt`` is of this
        attempt only: the next one removes it. Nothing is written where there is no folder, where the run is finished or
        another process trains it.

        Returns:
            False where another rank of this attempt was first; True otherwise, also where nothing was written.
        """
        reason, folder = without_secrets(reason), self._folder
        if folder.locked:  # by rank 0 of this attempt
            try:
                with folder.failure.open("x") as handle:
                    handle.write(reason)
            except FileExistsError:
                return False
        elif not folder.path.is_dir() or (held := lock(folder.path / ".lock")) is None:
            return True
        else:
            folder.lock = held
        state = folder.read_state() or RunState("running")
        if state.state != "finished" and not (state.state == "failed" and state.updated > self._began):
            state.state, state.reason = "failed", reason
            if self.train_state is not None:
                state.step, state.samples_seen = self.train_state.step, self.train_state.samples_seen
            folder.write_state(state)
        return True


class RunLog:
    """Writes rank 0's record of a run; on other ranks ``metrics`` is None and it does nothing.

    A full disk stops no training. ``state`` is that of the run, ``epoch_size`` the number of images in the training
    split, and ``setup`` what ``describe_setup`` returned.
    """

    def __init__(
        self,
        folder: RunFolder,
        status: RunStatus,
        console: RunConsole,
        metrics: MetricsWriter | None,
        *,
        state: TrainState,
        epoch_size: int,
        setup: Row,
    ) -> None:
        self.folder, self.status, self.console, self.say, self.setup = folder, status, console, console.say, setup
        self._metrics, self._state, self._epoch_size = metrics, state, epoch_size
        self._bad_samples = BadSampleCount(folder.bad_samples)
        status.train_state = state
        self._described = False
        """Whether the sinks have the recipe: with the first interval, as opening TensorBoard takes a second."""

    def start(self, passed_over: Iterable[str]) -> None:
        """Record the start of this attempt, and the damaged checkpoints that were passed over."""
        state, run_state = self._state, self.status.run_state
        if self._metrics is not None and run_state is not None:
            run_state.step, run_state.samples_seen = state.step, state.samples_seen
            self._guarded(
                lambda _: cut_lines(self.folder.ledger, is_row, lambda row: row["step"] <= state.step, self.say)
            )
            write_start(self.folder.events, run_state, self.folder.read_state())
            for warning in passed_over:
                self.event("checkpoint passed over", warning)
            self.status.write("running")

    def interval(self, losses: dict[str, float], rows: dict[str, dict[str, float]], image: NDArray | None) -> None:
        """Write an interval of training.

        Args:
            losses: shown on the console and written as "train" with counters of the run.
            rows: further measurements by kind; those of "train" are added to the losses.
            image: the training images of the interval, drawn, if there are any.
        """
        self.console.log_metrics(self._state.step, self._state.samples_seen / self._epoch_size, losses)

        def write(metrics: MetricsWriter) -> None:
            restarts = self.status.run_state.restarts if self.status.run_state else 0
            counts = {"bad_samples": self._bad_samples(), "restarts": restarts}
            for kind, values in (rows | {"train": losses | rows.get("train", {}) | counts}).items():
                metrics.write(kind, self._state.samples_seen, self._position() | values)
            if image is not None:
                metrics.image("images/training", self._state.samples_seen, image)
            if not self._described:
                metrics.describe_run(self._state.samples_seen)
                self._described = True
            self.status.write("running")

        self._guarded(write)

    def steps(
        self, rows: list[Row], spikes: list[Spike], samples: Callable[[int, int], tuple[NDArray, NDArray]]
    ) -> None:
        """Write rows of the ledger, and the steps whose loss was far above the level."""
        self._guarded(lambda _: write_rows(self.folder.ledger, rows, self.setup))
        if self._metrics is not None:
            write_spikes(self.folder.loss_spikes, spikes, samples, self.say)

    def result(self, kind: str, result: Evaluation | Probed, seconds: float) -> None:
        """Write the result of an evaluation or of probes, and how long they took."""
        self.say(f"{kind}  epoch {self._state.samples_seen / self._epoch_size:.2f}  {result}")
        self._write(kind, asdict(result) | {"seconds": round(seconds, 3)})

    def attention(self, numbers: dict[str, float] | None, drawing: NDArray[np.uint8]) -> None:
        """Write the drawn attention, and its numbers where they belong to an evaluation."""
        if numbers is not None:
            self._write("attention", numbers)
        self._image("images/attention", drawing)

    def take_image_request(self) -> bool:
        """Whether a user asked for images by a file of the run folder, which is removed; on rank 0 only."""
        if self._metrics is None or not self.folder.show.exists():
            return False
        self._guarded(lambda _: self.folder.show.unlink())
        return True

    def event(self, name: EventName, text: str) -> None:
        """Add a line to ``events.jsonl``."""
        state = self._state
        self._guarded(
            lambda _: write_event(self.folder.events, name, step=state.step, samples_seen=state.samples_seen, text=text)
        )

    def flush(self) -> None:
        """Bring to disk what was written so far."""
        self._guarded(lambda _: fsync(self.folder.ledger))
        self._guarded(lambda metrics: metrics.flush())

    def close(self) -> None:
        """Flush, and restore the terminal."""
        self.console.close()
        self._guarded(lambda metrics: metrics.close())

    def _write(self, kind: str, values: dict[str, float]) -> None:
        self._guarded(lambda metrics: metrics.write(kind, self._state.samples_seen, self._position() | values))

    def _position(self) -> dict[str, float]:
        return {"step": self._state.step, "epoch": round(self._state.samples_seen / self._epoch_size, 4)}

    def _image(self, name: str, pixels: NDArray[np.uint8]) -> None:
        self._guarded(lambda metrics: metrics.image(name, self._state.samples_seen, pixels))

    def _guarded(self, write: Callable[[MetricsWriter], None]) -> None:
        if self._metrics is not None:
            try:
                write(self._metrics)
            except OSError as error:
                self.say(f"WARNING metrics or state could not be written: {error}")


class StartUp:
    """Seconds of each phase of a start, from the start of the process to the end of its first step.

    Args:
        phase: name of the phase that began with this process and ends now.
    """

    def __init__(self, phase: str) -> None:
        self.seconds: dict[str, float] = {}
        began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        self._ended = time.monotonic() - (time.clock_gettime(time.CLOCK_BOOTTIME) - began)
        self.end(phase)

    def end(self, phase: str) -> None:
        """End a phase, which began when the one before ended. The seconds of phases of the same name are added up."""
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._ended
        self._ended = now

    def table(self) -> str:
        """The names of the phases in one line, and their seconds below."""
        columns = {**self.seconds, "total": sum(self.seconds.values())}
        values = "  ".join(f"{seconds:{len(name)}.2f}" for name, seconds in columns.items())
        return f"start-up (s)  {'  '.join(columns)}\n              {values}"
