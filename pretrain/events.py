"""``events.jsonl``: what happened to a run apart from its measurements; one line each, never rewritten.

| event | when |
|---|---|
| start | each start; with ``after``, ``run.json`` before it: state, reason, step, samples seen and time |
| went back | the weights went back to a checkpoint, after too many skipped steps in a row |
| checkpoint failed | a checkpoint could not be written |
| checkpoint passed over | a damaged checkpoint was found while loading |
| other code | ``slurm`` starts the run again, with other code than before |

A line has ``event``, ``time`` (Unix), ``step``, ``samples_seen`` and ``text``. Nothing is recorded twice:
skipped steps are counted in ``metrics.jsonl``, bad samples, loss spikes and hangs have files of their own, and the end
of a run is ``run.json``.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any, Literal

from pretrain.run_state import RunState

EventName = Literal["start", "went back", "checkpoint failed", "checkpoint passed over", "other code"]


def write_event(file: Path, name: EventName, *, step: int, samples_seen: int, text: str, **facts: Any) -> None:
    """Add a line to ``events.jsonl``; only rank 0 does."""
    line = {"event": name, "time": round(time.time(), 3), "step": step, "samples_seen": samples_seen, "text": text}
    try:
        with file.open("a") as handle:
            handle.write(json.dumps(line | facts) + "\n")
    except OSError as error:
        print(f"WARNING event '{name}' could not be written: {error}", file=sys.stderr)  # noqa: T201


def write_start(file: Path, state: RunState, previous: RunState | None) -> None:
    """The start of an attempt, and how the ``previous`` one left ``run.json``; None for the first."""
    after = None
    if previous is not None:
        after = {
            "state": previous.state,
            "reason": previous.reason,
            "step": previous.step,
            "samples_seen": previous.samples_seen,
            "time": previous.updated,
        }
    text = f"{state.world_size} rank{'s' * (state.world_size != 1)}, host {state.host}" + (
        f", job {state.job_id}" if state.job_id else ""
    )
    write_event(file, "start", step=state.step, samples_seen=state.samples_seen, text=text, after=after)
