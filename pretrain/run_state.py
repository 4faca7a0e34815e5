"""``run.json``, the status of a run, and ``events.jsonl``, what happened to it apart from its measurements.

``events.jsonl`` has one line for each event, never rewritten:

| event | when |
|---|---|
| start | each start; with ``after``, ``run.json`` before it: state, reason, step, samples seen and time |
| went back | the weights went back to a checkpoint, after too many skipped steps in a row |
| checkpoint failed | a checkpoint could not be written |
| checkpoint passed over | a damaged checkpoint was found while loading |
| other code | ``slurm`` starts the run again, with other code than before |

A line has ``event``, ``time`` (Unix), ``step``, ``samples_seen`` and ``text``. Nothing is recorded twice:
skipped steps are counted in ``metrics.jsonl``, bad samples, loss spikes and hangs have files of their own, and the end
of a run is ``run.json``. Imports nothing heavy, since tools that watch runs read them often.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from pretrain.files import read_sealed
from pretrain.outcome import UserError

State = Literal["running", "preempted", "finished", "failed"]
EventName = Literal["start", "went back", "checkpoint failed", "checkpoint passed over", "other code"]


@dataclass
class RunState:
    """``run.json``: what a user or a launcher needs to know about a run."""

    state: State
    reason: str = ""
    """Why the run is in this state, in one line."""
    step: int = 0
    total_steps: int = 0
    samples_seen: int = 0
    restarts: int = 0
    """How often the run was started again after the first time."""
    world_size: int = 0
    job_id: str = ""
    """Slurm's, where there is one."""
    host: str = ""
    """Where rank 0 runs."""
    fingerprints: dict[str, str] = field(default_factory=dict)
    """Of the content of the splits "train" and "val"; empty in runs of older versions."""
    updated: float = 0.0
    """Unix time of the last change: the heartbeat."""


def read_state(run: Path) -> RunState | None:
    """``run.json`` of a run folder; None for a new run.

    Raises:
        UserError: it is damaged.
    """
    path = run / "run.json"
    try:
        state = RunState(**read_sealed(path))
    except FileNotFoundError:
        return None
    except TypeError as error:
        raise UserError(f"{path} is not the state of a run ({error}): remove it") from None
    for name, default in asdict(RunState("running")).items():
        kind = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(value := getattr(state, name), kind) or (name == "state" and value not in get_args(State)):
            raise UserError(f"{path} is not the state of a run ({name} is {value!r:.60}): remove it")
    return state


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
        names = ("state", "reason", "step", "samples_seen")
        after = {name: getattr(previous, name) for name in names} | {"time": previous.updated}
    job = f", job {state.job_id}" if state.job_id else ""
    text = f"{state.world_size} rank{'s' * (state.world_size != 1)}, host {state.host}{job}"
    write_event(file, "start", step=state.step, samples_seen=state.samples_seen, text=text, after=after)
