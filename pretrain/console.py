"""What a person sees of a run: a bar on a terminal, plain lines in a log. Only rank 0 speaks."""

import sys
import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

ETA_SKIPS_STEPS = 5
"""The first steps build and warm everything up; an estimate that holds them is wrong for a long time."""


class RunConsole:
    """Progress and messages of one process; a rank other than 0 gets a silent one."""

    def __init__(self, *, speaks: bool, total_steps: int, first_step: int, global_batch: int) -> None:
        self._speaks = speaks
        self._total = total_steps
        self._batch = global_batch
        self._console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
        self._first = first_step
        self._clock: tuple[int, float] | None = None
        self._bar: Progress | None = None
        if speaks and self._console.is_terminal:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task("training", total=total_steps, completed=first_step, status="starting")
            self._bar.start()

    def say(self, text: str) -> None:
        """Print a line."""
        if self._speaks:
            self._console.print(text, markup=False)

    def step_done(self, step: int, waited_s: float = 0.0) -> None:
        """Move the bar; called after every step. ``waited_s`` is time that was not training, such as evaluation."""
        if not self._speaks:
            return
        if self._clock is None:
            if step - self._first >= ETA_SKIPS_STEPS:
                self._clock = (step, time.monotonic())
        elif waited_s:
            self._clock = (self._clock[0], self._clock[1] + waited_s)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status=self._status(step))

    def log_metrics(self, step: int, epoch: float, values: dict[str, float]) -> None:
        """Print the metrics of an interval as one line, greppable by ``step``."""
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        status = self._status(step) if self._bar is None else ""
        self.say(f"step {step}/{self._total}  epoch {epoch:.2f}  {shown}  {status}".rstrip())

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _status(self, step: int) -> str:
        if self._clock is None or step <= self._clock[0]:
            return ""
        per_step = (time.monotonic() - self._clock[1]) / (step - self._clock[0])
        left = timedelta(seconds=round(per_step * (self._total - step)))
        return f"{self._batch / per_step:.0f} images/s  ETA {left}"
