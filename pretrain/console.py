"""Shows a run: a live view on a terminal, plain lines in a log. Only rank 0 prints."""

import os
import select
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from math import ceil

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderResult
from rich.live import Live
from rich.text import Text

from data_pipeline.errors import printable, without_secrets

ETA_SKIPS_STEPS = 5
"""The first steps build and warm everything up; an estimate that holds them is wrong for a long time."""
WIDEST = 79
"""Columns at most: a terminal that stays as wide never has to wrap the view."""
BAR = 30
"""Columns of the bar at most."""
SHORTEST_BAR = 6
"""Columns below which the bar is left out."""
EVENTS = 3
"""Newest events that the live view repeats: on a terminal where much is printed they would be gone."""


class RunConsole:
    """Progress and messages of one process; a rank other than 0 gets a silent one.

    On a terminal the measurements of an interval replace each other at the bottom, and events are printed above them.
    Elsewhere each interval is a line that begins with "step".
    """

    def __init__(self, *, enabled: bool, total_steps: int, first_step: int, global_batch: int) -> None:
        self._enabled = enabled
        self._total = total_steps
        self._batch = global_batch
        self._console = Console(file=sys.stdout, soft_wrap=True, highlight=False, emoji=False)
        self._first = first_step
        self._clock: tuple[int, float] | None = None
        self._view: LiveView | None = None
        if enabled and self._console.is_terminal:
            self._view = LiveView(self._console)
            self._show(first_step)
            self._view.start()

    def say(self, text: str) -> None:
        """Print lines, without control characters and without secrets of URLs."""
        lines = [printable(without_secrets(line)) for line in text.split("\n")]
        if self._view is not None:
            self._view.events = [*self._view.events, lines[0]][-EVENTS:]
        if self._enabled:
            discard_lost_output()
            with suppress(OSError):  # such as a full disk, on which the log is
                self._console.print("\n".join(lines), markup=False)

    def step_done(self, step: int, waited_s: float = 0.0) -> None:
        """Move the bar; called after every step. ``waited_s`` is time that was not training, such as evaluation."""
        if not self._enabled:
            return
        if self._clock is None:
            if step - self._first >= ETA_SKIPS_STEPS:
                self._clock = (step, time.monotonic())
        elif waited_s:
            self._clock = (self._clock[0], self._clock[1] + waited_s)
        if self._view is not None:
            self._show(step)

    def log_metrics(self, step: int, epoch: float, values: dict[str, float]) -> None:
        """Show the metrics of an interval; in a log as one line, greppable by ``step``."""
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self._view is not None:
            self._view.metrics = f"epoch {epoch:.2f}  {shown}"
        else:
            self.say(f"step {step}/{self._total}  epoch {epoch:.2f}  {shown}  {self._status(step)}".rstrip())

    def close(self) -> None:
        """Take the view away; the last metrics stay as a line."""
        if self._view is not None:
            view, self._view = self._view, None
            view.stop()
            if view.metrics:
                self.say(f"{view.progress.split('  ')[0]}  {view.metrics}")

    def _show(self, step: int) -> None:
        assert self._view is not None
        self._view.share = step / max(self._total, 1)
        self._view.progress = f"step {step}/{self._total}  {self._status(step)}".rstrip()

    def _status(self, step: int) -> str:
        if self._clock is None or step <= self._clock[0]:
            return ""
        per_step = (time.monotonic() - self._clock[1]) / (step - self._clock[0])
        left = timedelta(seconds=round(per_step * (self._total - step)))
        return f"{self._batch / per_step:.0f} images/s  ETA {left}"


def discard_lost_output() -> None:
    """Send to /dev/null what is printed to a closed terminal or pipe: it must not end the run."""
    for descriptor in (1, 2):
        poll = select.poll()
        poll.register(descriptor, 0)
        if poll.poll(0):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


class LiveView(Live):
    """A few lines at the bottom of a terminal that stay in place when it is resized.

    A terminal that gets narrower wraps the lines that are there; rich would go up by as many as it had drawn and leave
    the rest. Here it goes up by as many as they are now.
    """

    def __init__(self, console: Console) -> None:
        self.progress = self.metrics = ""
        self.share = 0.0
        self.events: list[str] = []
        self._drawn: list[int] = []
        super().__init__(_Lines(self), console=console, transient=True, refresh_per_second=1)

    def lines(self, width: int) -> list[Text]:
        """What is shown on so many columns."""
        width = max(1, min(width - 1, WIDEST))
        bar = self._bar(width - len(self.progress) - 1)
        texts = [bar + self.progress, *([self.metrics] if self.metrics else []), *(f"· {one}" for one in self.events)]
        lines = [Text(text, no_wrap=True, overflow="ellipsis", end="") for text in texts]
        for line in lines:
            line.truncate(width, overflow="ellipsis")
        self._drawn = [cell_len(line.plain) for line in lines]
        return lines

    def _bar(self, columns: int) -> str:
        """What numbers leave of a line; on a narrow terminal nothing rather than a stump."""
        columns = min(columns, BAR)
        done = int(self.share * columns)
        return f"{'━' * done}{'╌' * (columns - done)} " if columns >= SHORTEST_BAR else ""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Put the view below what is printed; called by rich for everything that it prints."""
        shape = self._live_render._shape  # noqa: SLF001 - rich's version is pinned
        if shape is not None and self._drawn:
            rows = sum(max(1, ceil(columns / self.console.width)) for columns in self._drawn)
            self._live_render._shape = (shape[0], rows)  # noqa: SLF001
        return super().process_renderables(renderables)


class _Lines:
    """The view as rich draws it: at whatever width the terminal has by then."""

    def __init__(self, view: LiveView) -> None:
        self._view = view

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines: Iterable[Text] = self._view.lines(options.max_width)
        yield Text("\n").join(lines)
