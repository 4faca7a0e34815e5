"""A profile of chosen steps: where their time went, for ``--profile FIRST:LAST``."""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import profile, schedule

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


def step_profile(steps: tuple[int, int], ahead: range, base: Path, say: Callable[[str], None]) -> profile | None:
    """Profile the first to the last of ``steps``; when that is over, write ``BASE-steps-10-13`` with its endings.

    ``.trace.json.gz`` is for chrome://tracing or Perfetto, ``.txt`` a summary, and on a GPU ``.memory.pickle`` for
    pytorch.org/memory_viz: the newest allocations.

    Args:
        steps: counted from 1.
        ahead: what the run has still to take, from the steps taken to the steps of the run.
        base: of the files' names.
        say: prints a line.

    Returns:
        what is to be started, told of the end of every step, and stopped; None where the steps are past.

    Raises:
        UserError: the run does not have these steps.
    """
    first, last = steps
    if last > ahead.stop:
        raise UserError(f"--profile {first}:{last}: the run has {ahead.stop} steps; choose steps that it takes")
    if first <= ahead.start:
        say(f"WARNING --profile {first}:{last}: the run is at step {ahead.start}; nothing is profiled")
        return None
    base = base.with_name(f"{base.name}-steps-{first}-{last}")

    def write(found: profile) -> None:
        sort = "self_cuda_time_total" if found.use_device == "cuda" else "self_cpu_time_total"
        try:
            base.parent.mkdir(parents=True, exist_ok=True)
            if torch.cuda.is_initialized():
                torch.cuda.memory._dump_snapshot(f"{base}.memory.pickle")  # noqa: SLF001 - its only interface
                torch.cuda.memory._record_memory_history(enabled=None)  # noqa: SLF001
            found.export_chrome_trace(f"{base}.trace.json.gz")
            Path(f"{base}.txt").write_text(found.key_averages().table(sort_by=sort, row_limit=ROWS))
        except OSError as error:
            say(f"WARNING the profile could not be written: {error}")
        else:
            say(f"profile of steps {first} to {last}: {base}.txt, .trace.json.gz")

    if torch.cuda.is_initialized():
        torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_EVENTS)  # noqa: SLF001
    warmup = min(1, first - 1 - ahead.start)
    wait = first - 1 - ahead.start - warmup
    return profile(schedule=schedule(wait=wait, warmup=warmup, active=last - first + 1, repeat=1), on_trace_ready=write)
