"""A profile of chosen steps: where their time went, for ``--profile FIRST:LAST``."""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import profile

from pretrain.outcome import UserError

SNAPSHOT_EVENTS = 200_000
"""Allocations that a memory snapshot holds at most."""
ROWS = 20
"""Operators in the summary."""


def parse_steps(text: str) -> tuple[int, int]:
    """Read "10:13", or "10" for one step: first and last, both profiled, counted from 1.

    Raises:
        UserError: it is something else.
    """
    found = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last:
        raise UserError(f"--profile {text}: write the first and the last step to profile, for example --profile 10:13")
    return first, last


class StepProfiler:
    """Profiles some steps of this rank; when that is over, writes ``BASE-steps-10-13`` with its endings.

    ``.trace.json.gz`` is for chrome://tracing or Perfetto, ``.txt`` a summary, and on a GPU ``.memory.pickle`` for
    pytorch.org/memory_viz.

    Args:
        steps: the first and the last, counted from 1.
        ahead: what the run has still to take, from the steps taken to the steps of the run.
        base: of the files' names.
        device: of this rank.
        say: prints a line.

    Raises:
        UserError: the run does not have these steps.
    """

    def __init__(
        self, steps: tuple[int, int], ahead: range, base: Path, device: torch.device, say: Callable[[str], None]
    ) -> None:
        (self._first, self._last), asked = steps, "--profile {}:{}".format(*steps)
        if self._last > ahead.stop:
            raise UserError(f"{asked}: the run has {ahead.stop} steps; choose steps that it takes")
        if self._first <= ahead.start:
            say(f"WARNING {asked}: the run is at step {ahead.start}; nothing is profiled")
        self._base = base.with_name(f"{base.name}-steps-{self._first}-{self._last}")
        self._gpu, self._say = device.type == "cuda", say
        self._profile: profile | None = None

    def before_step(self, step: int) -> None:
        """Begin where the first step to profile follows step ``step``."""
        if step == self._first - 1:
            if self._gpu:
                torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_EVENTS)  # noqa: SLF001 - no other way
            self._profile = profile()
            self._profile.start()

    def after_step(self, step: int) -> None:
        """End after the last step to profile, and write what was found."""
        if self._profile is None or step != self._last:
            return
        found, self._profile = self._profile, None
        found.stop()
        try:
            self._base.parent.mkdir(parents=True, exist_ok=True)
            if self._gpu:
                torch.cuda.memory._dump_snapshot(f"{self._base}.memory.pickle")  # noqa: SLF001
            found.export_chrome_trace(f"{self._base}.trace.json.gz")
            sort = "self_cuda_time_total" if self._gpu else "self_cpu_time_total"
            Path(f"{self._base}.txt").write_text(found.key_averages().table(sort_by=sort, row_limit=ROWS))
        except OSError as error:
            self._say(f"WARNING the profile could not be written: {error}")
        else:
            self._say(f"profile of steps {self._first} to {self._last}: {self._base}.txt, .trace.json.gz")
        finally:
            if self._gpu:
                torch.cuda.memory._record_memory_history(enabled=None)  # noqa: SLF001

    def close(self) -> None:
        """End without a result if the run ends before the last step to profile."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None
            steps = f"steps {self._first} to {self._last}"
            self._say(f"WARNING the profile of {steps} was not written: the run ended before")
