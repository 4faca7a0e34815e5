"""A profile of chosen steps: where their time went, for ``--profile FIRST:LAST``."""

import re
from contextlib import ExitStack
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from pretrain.monitoring.step_timer import PHASES, Phase, StepTimer
from pretrain.outcome import UserError

ROWS = 20
"""Operators in the summary."""
SNAPSHOT_EVENTS = 200_000
"""Allocations that a memory snapshot holds at most."""


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
    """Profiles some steps of this rank and writes what it found to the run's folder.

    ``rank-00000-steps-10-13.trace.json.gz`` is for chrome://tracing or Perfetto, ``.txt`` is a summary, and on a GPU
    ``.memory.pickle`` is for pytorch.org/memory_viz.

    Args:
        steps: first and last.
        folder: where to.
        rank: of this process.
        device: of this process.
    """

    def __init__(self, steps: tuple[int, int], *, folder: Path, rank: int, device: torch.device) -> None:
        self.first, self.last = steps
        self._base = folder / f"rank-{rank:05d}-steps-{self.first}-{self.last}"
        self._device = device
        self._profile: profile | None = None
        self._span = ExitStack()
        self._phase: Phase | None = None

    def check(self, step: int, total_steps: int) -> str:
        """Compare with the steps taken and those of the run; a line to print where they are past, or "".

        Raises:
            UserError: the run does not have these steps.
        """
        asked = f"--profile {self.first}:{self.last}"
        if self.last > total_steps:
            raise UserError(f"{asked}: the run has {total_steps} steps; choose steps that it takes")
        return f"WARNING {asked}: the run is at step {step}; nothing is profiled" if self.first <= step else ""

    def before_step(self, step: int, timer: StepTimer) -> None:
        """Begin where the first step to profile follows step ``step``."""
        if step != self.first - 1:
            return
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_EVENTS)  # noqa: SLF001 - its only interface
        self._timer = StepTimer(self._device)
        self._profile = profile(activities=activities)
        self._profile.start()
        timer.listeners.append(self._entered)
        self._entered("other")

    def after_step(self, step: int, timer: StepTimer) -> str:
        """End after the last step to profile; a line to print, or ""."""
        if step != self.last or self._profile is None:
            return ""
        found, self._profile = self._profile, None
        timer.listeners.remove(self._entered)
        seconds = self._timer.split()
        self._span.close()
        found.stop()
        try:
            self._base.parent.mkdir(parents=True, exist_ok=True)
            if self._device.type == "cuda":
                torch.cuda.memory._dump_snapshot(f"{self._base}.memory.pickle")  # noqa: SLF001
            found.export_chrome_trace(f"{self._base}.trace.json.gz")
            Path(f"{self._base}.txt").write_text(self._summary(found, seconds))
        except OSError as error:
            return f"WARNING the profile could not be written: {error}"
        finally:
            if self._device.type == "cuda":
                torch.cuda.memory._record_memory_history(enabled=None)  # noqa: SLF001
        return f"profile of steps {self.first} to {self.last}: {self._base}.txt, .trace.json.gz"

    def abandon(self) -> str:
        """End without a result if a stop came first; a line for the log, or ""."""
        if self._profile is None:
            return ""
        self._span.close()
        self._profile.stop()
        self._profile = None
        return f"WARNING the profile of steps {self.first} to {self.last} was not written: the run ended before"

    def _entered(self, phase: Phase | None) -> None:
        self._timer.enter(phase)
        self._span.close()
        if phase is not None:
            self._span.enter_context(record_function(f"phase: {phase}"))

    def _summary(self, found: profile, seconds: dict[Phase, float]) -> str:
        steps, total = self.last - self.first + 1, max(sum(seconds.values()), 1e-9)
        sort = "self_cuda_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        operators = [event for event in found.key_averages() if not event.key.startswith("phase: ")]
        table = torch.autograd.profiler_util.EventList(operators, use_device=found.use_device).table(
            sort_by=sort, row_limit=ROWS, max_name_column_width=48
        )
        shares = [
            f"{phase:<10} {1e3 * seconds[phase] / steps:10.2f} ms {seconds[phase] / total:7.1%}" for phase in PHASES
        ]
        return "\n".join(
            [
                f"Steps {self.first} to {self.last}: {1e3 * total / steps:.2f} ms a step; profiling makes it longer.",
                "",
                *shares,
                "",
                f"The {ROWS} operators with most time of their own ({sort}):",
                table,
            ]
        )
