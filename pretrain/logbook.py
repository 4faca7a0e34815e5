"""What a run tells: lines, measurements, events and ``run.json``. A disk that refuses stops no training."""

from collections.abc import Callable
from dataclasses import asdict

from pretrain.console import RunConsole
from pretrain.evaluation.accuracy import Evaluation
from pretrain.evaluation.probes import Probed
from pretrain.events import EventName, write_event
from pretrain.metrics import MetricsWriter
from pretrain.monitoring.bad_samples import BadSampleCount
from pretrain.monitoring.monitor import Measured, Monitor, describe
from pretrain.run_folder import RunFolder
from pretrain.run_state import RunState, State
from pretrain.state import TrainState


class Logbook:
    """Writes rank 0's account of a run; on the other ranks nothing but the first reason of a failure.

    Args:
        folder: of the run.
        state: of this incarnation; kept up to date here.
        progress: read, never changed.
        metrics: on rank 0, else None.
        console: prints on rank 0.
        monitor: whose pictures are shown with an interval.
        epoch_size: pictures in the training split.
    """

    def __init__(
        self,
        folder: RunFolder,
        state: RunState,
        progress: TrainState,
        *,
        metrics: MetricsWriter | None,
        console: RunConsole,
        monitor: Monitor,
        epoch_size: int,
    ) -> None:
        self._folder, self._state, self._progress = folder, state, progress
        self._metrics, self._console, self._monitor = metrics, console, monitor
        self._epoch_size = epoch_size
        self._bad_samples = BadSampleCount(folder.bad_samples)
        self._described = False
        """Whether the sinks were given recipe and environment by this incarnation."""

    @property
    def epoch(self) -> float:
        """Passes over the training split so far."""
        return self._progress.samples_seen / self._epoch_size

    def where(self) -> dict[str, float]:
        """Step and epoch, as they stand beside measurements."""
        return {"step": self._progress.step, "epoch": round(self.epoch, 4)}

    def interval(
        self, values: dict[str, float], measured: Measured, *, images_per_second: float, pictures: bool
    ) -> None:
        """Write an interval of training.

        Args:
            values: its means, with learning rate and skipped steps.
            measured: by the monitor.
            images_per_second: over all ranks.
            pictures: whether some were asked for; the monitor is told that they are on their way.
        """
        self._console.log_metrics(self._progress.step, self.epoch, values)
        speed = {"images_per_second": round(images_per_second, 2), "data_wait": round(measured.data_wait, 4)}
        if measured.mfu is not None:
            speed["mfu"] = round(measured.mfu, 4)

        def write(metrics: MetricsWriter) -> None:
            where, seen = self.where(), self._progress.samples_seen
            counts = {"bad_samples": self._bad_samples(), "restarts": self._state.restarts}
            memory = {"memory_gib": round(measured.memory_gib, 3)}
            metrics.write("train", seen, where | values | speed | memory | counts)
            metrics.write("norms", seen, where | measured.norms)
            metrics.write("time", seen, where | measured.seconds)
            self._monitor.show_batch(metrics, seen)
            if not self._described:
                describe(metrics, seen, self._folder.path)
                self._described = True
            if pictures:
                self._monitor.requested()
            self.write_state("running")

        self._tell(write)

    def result(self, kind: str, result: Evaluation | Probed, *, seconds: float) -> None:
        """Write what an evaluation or the probes came to, and how long they took."""
        self._console.say(f"{kind}  epoch {self.epoch:.2f}  {result}")
        values = {**self.where(), **asdict(result), "seconds": round(seconds, 3)}
        self._tell(lambda metrics: metrics.write(kind, self._progress.samples_seen, values))

    def event(self, name: EventName, text: str) -> None:
        """Add a line to ``events.jsonl``."""
        where = {"step": self._progress.step, "samples_seen": self._progress.samples_seen}
        self._tell(lambda _: write_event(self._folder.events, name, text=text, **where))

    def flush(self) -> None:
        """Have all on disk that was written so far."""
        self._tell(lambda metrics: metrics.flush())

    def write_state(self, state: State, reason: str = "") -> None:
        """Write ``run.json``.

        Raises:
            OSError: it cannot be written.
        """
        if self._metrics is not None:
            self._state.state, self._state.reason = state, reason
            self._state.step, self._state.samples_seen = self._progress.step, self._progress.samples_seen
            self._folder.write_state(self._state)

    def fail(self, reason: str) -> bool:
        """Write down why the run fails: on any rank, and the first one's reason stands in ``run.json``.

        Returns:
            whether this is the first.
        """
        first = self._folder.first_failure(reason)
        self.write_state("failed", first)
        return first == reason

    def _tell(self, write: Callable[[MetricsWriter], None]) -> None:
        if self._metrics is not None:
            try:
                write(self._metrics)
            except OSError as error:
                self._console.say(f"WARNING metrics or state could not be written: {error}")
