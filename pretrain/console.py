"""Shows a run: a live view on a terminal, plain lines in a log. Only rank 0 prints."""

import os
import select
import sys
import time
from collections import deque
from contextlib import suppress
from datetime import timedelta

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from data_pipeline.errors import printable, without_secrets

ETA_SKIPS_STEPS = 5
"""The first steps build and warm everything up; an estimate that holds them is wrong for a long time."""
BAR = 79
"""Columns of the bar at most."""
EVENTS = 3
"""Newest events that the live view repeats: on a terminal where much is printed they would be gone."""


class RunConsole:
    """Progress and messages of one process; a rank other than 0 gets a silent one, which is not ``enabled``.

    On a terminal the measurements of an interval replace each other at the bottom, and events are printed above them.
    Elsewhere each interval is a line that begins with "step".
    """

    def __init__(self, enabled: bool, total_steps: int, first_step: int, global_batch: int) -> None:
        self._enabled, self._total, self._first, self._batch = enabled, total_steps, first_step, global_batch
        self._step, self._metrics, self._events = first_step, "", deque[str](maxlen=EVENTS)
        self._console = Console(file=sys.stdout, soft_wrap=True, highlight=False, emoji=False)
        self._clock: tuple[int, float] | None = None
        """A step, and when it was over, later by what was no training since."""
        self._live: Live | None = None
        if enabled and self._console.is_terminal:
            self._live = Live(console=self._console, transient=True, refresh_per_second=1, get_renderable=self._view)
            self._live.start()

    def say(self, text: str) -> None:
        """Print lines, without control characters and without secrets of URLs."""
        lines = [printable(without_secrets(line)) for line in text.split("\n")]
        self._events.append(lines[0])
        if self._enabled:
            discard_lost_output()
            with suppress(OSError):  # such as a full disk, on which the log is
                self._console.print("\n".join(lines), markup=False)

    def step_done(self, step: int, waited_s: float = 0.0) -> None:
        """Move the bar; called after every step. ``waited_s`` is time that was not training, such as evaluation."""
        self._step = step
        if self._clock is not None:
            self._clock = (self._clock[0], self._clock[1] + waited_s)
        elif step - self._first >= ETA_SKIPS_STEPS:
            self._clock = (step, time.monotonic())

    def log_metrics(self, step: int, epoch: float, values: dict[str, float]) -> None:
        """Show the metrics of an interval; in a log as one line, greppable by ``step``."""
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._metrics = f"epoch {epoch:.2f}  {shown}"
        if self._live is None:
            self.say(f"step {step}/{self._total}  {self._metrics}  {self._rate()}".rstrip())

    def close(self) -> None:
        """Take the view away; the last metrics stay as a line."""
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()
            if self._metrics:
                self.say(f"step {self._step}/{self._total}  {self._metrics}")

    def _view(self) -> Group:
        columns = min(BAR, self._console.width)
        bar = "━" * (columns * self._step // max(self._total, 1))
        lines = [bar.ljust(columns, "╌"), f"step {self._step}/{self._total}  {self._rate()}"]
        lines += [*filter(None, [self._metrics]), *(f"· {event}" for event in [*self._events])]
        return Group(*(Text(line, no_wrap=True, overflow="ellipsis") for line in lines))

    def _rate(self) -> str:
        if self._clock is None or self._step <= self._clock[0]:
            return ""
        per_step = (time.monotonic() - self._clock[1]) / (self._step - self._clock[0])
        left = timedelta(seconds=round(per_step * (self._total - self._step)))
        return f"{self._batch / per_step:.0f} images/s  ETA {left}"


def discard_lost_output() -> None:
    """Send to /dev/null what is printed to a closed terminal or pipe: it must not end the run."""
    for descriptor in (1, 2):
        poll = select.poll()
        poll.register(descriptor, 0)
        if poll.poll(0):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
