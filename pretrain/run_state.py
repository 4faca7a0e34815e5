"""``run.json``: the status of a run. Imports nothing heavy, since tools that watch runs read it often."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, get_args

from pretrain.files import read_sealed
from pretrain.outcome import UserError

State = Literal["running", "preempted", "finished", "failed"]


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
