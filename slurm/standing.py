"""How a run stands: what its folder says, held against what Slurm says. Neither is believed alone."""

import fcntl
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pretrain.files import is_measurement, json_object
from pretrain.run_state import RunState
from slurm.folder import SlurmFolder
from slurm.history import Chapter, History, current_job, ended_job
from slurm.scheduler import Job

TAIL_BYTES = 65_536
"""Enough of ``metrics.jsonl`` to hold its last line of training."""


@dataclass
class Standing:
    """A run, for a table or for ``--json``. Unknown numbers are None."""

    name: str
    state: str
    """waiting, held, starting, running, stopping, restarting, finished, stopped, cancelled, failed, lost or unknown."""
    why: str = ""
    """What it waits for, or why it ended or was started again last."""
    step: int = 0
    total_steps: int | None = None
    saved_step: int = 0
    images_per_second: float | None = None
    loss: float | None = None
    eta_s: float | None = None
    restarts: int = 0
    nodes: list[str] = field(default_factory=list)
    ranks: int | None = None
    heartbeat_s: float | None = None
    """Seconds since the run wrote its state last."""
    job: str = ""
    log: str = ""
    """Of rank 0 of the newest incarnation."""
    history: list[dict[str, Any]] = field(default_factory=list)


def find_runs(runs: Path) -> list[Path]:
    """Run folders under ``runs``, by name."""
    return sorted(path.parent for path in {*runs.glob("*/run.json"), *runs.glob("*/slurm")})


def standing_of(run: Path, queue: dict[str, Job] | None) -> Standing:
    """How a run stands.

    Args:
        run: its folder.
        queue: the jobs that Slurm knows; None where there is no Slurm.
    """
    folder = SlurmFolder(run)
    chapters, state = History(folder.history).chapters(), folder.state()
    job = current_job(folder, chapters, queue or {})
    last = chapters[-1] if chapters else None
    name, why = _state(folder, state, chapters, job, queue)
    standing = Standing(name=run.name, state=name, why=why, saved_step=folder.saved_step(), job=job.id if job else "")
    if state is not None:
        standing.step, standing.total_steps = state.step, state.total_steps or None
        standing.restarts, standing.ranks = state.restarts, state.world_size or None
        standing.nodes, standing.heartbeat_s = [state.host], round(time.time() - state.updated, 1)
    if last is not None:
        standing.restarts, standing.ranks, standing.nodes = len(chapters) - 1, last.ranks, last.nodes
        standing.job = standing.job or last.next_job or last.job
        standing.log = str(folder.log(last.incarnation, 0))
        standing.history = [asdict(chapter) for chapter in chapters]
    _add_measurements(standing, run, alive=name == "running")
    return standing


def _state(
    folder: SlurmFolder,
    state: RunState | None,
    chapters: list[Chapter],
    job: Job | None,
    queue: dict[str, Job] | None,
) -> tuple[str, str]:
    last = chapters[-1] if chapters else None
    reason = last.reason if last else ""
    if state is not None and state.state == "finished":
        return "finished", ""
    if job is None:
        return _without_job(folder, state, last, queue)
    if folder.stop_request():
        return "stopping", folder.stop_request()
    if job.held:
        return "held", _who_releases(folder, job) + (f"; before: {reason}" if reason else "")
    if job.state == "PENDING":
        return "waiting", f"Slurm: {job.reason}" + (f"; before: {reason}" if reason else "")
    before = next((chapter.reason for chapter in reversed(chapters[:-1]) if chapter.reason), "")
    if last is None or (last.ended and job.state != "COMPLETING"):
        return "starting", reason
    if last.ended:
        return ("restarting" if last.action in ("leave", "requeue") else "stopping"), reason
    if job.state == "COMPLETING":
        return "stopping", before
    if state is None or state.updated < last.begun:
        return "starting", before
    if state.state != "running":
        return "stopping", state.reason
    return "running", before


def _who_releases(folder: SlurmFolder, job: Job) -> str:
    """Why a job is held, and how it goes on."""
    if job.launch_failed:
        return f"Slurm could not launch it and holds it: `python -m slurm.release {folder.run}` lets it go on"
    if job.reason == "JobHeldAdmin":
        return f"an administrator holds it, who alone can let it go on: `scontrol release {job.id}`"
    return f"Slurm: {job.reason}; `scontrol release {job.id}` lets it go on"


def _without_job(
    folder: SlurmFolder, state: RunState | None, last: Chapter | None, queue: dict[str, Job] | None
) -> tuple[str, str]:
    """State of a run that has no job which runs or waits."""
    if last is None and not folder.launched():
        return _started_by_hand(folder, state)
    if last is not None and last.job.startswith("local") and not last.ended and _locked(folder.run):
        return "running", ""
    final = last is not None and last.ended and last.action in ("none", "cancel")
    if final and last is not None and last.cause not in ("stopped", "cancelled"):
        return "failed", last.reason
    if folder.stop_request():  # a launch withdraws it, so it is newer than what the last one came to
        return "stopped", folder.stop_request()
    if final and last is not None:
        return str(last.cause), last.reason
    if queue is None and last is not None and last.ended:
        return "restarting", f"{last.reason}; Slurm could not be asked"
    if queue is None:
        return (state.state if state else "unknown"), "as its folder says; Slurm could not be asked"
    gone = ended_job(folder, last, queue)
    if gone is not None and gone.state == "CANCELLED":
        return "cancelled", f"job {gone.id} was cancelled"
    what = f"job {gone.id} ended as {gone.state}" if gone else "its job is gone from the queue"
    again = f"`python -m slurm.release {folder.run}`" if gone and gone.failed else "launch it again"
    return "lost", f"{what}, and nothing goes on in its place: {again}" + (
        f"; before: {last.reason}" if last and last.reason else ""
    )


def _started_by_hand(folder: SlurmFolder, state: RunState | None) -> tuple[str, str]:
    if state is None:
        return "unknown", "run.json cannot be read"
    if state.state == "running" and not _locked(folder.run):
        return "lost", f"run.json says running, but no process of {state.host} holds the run; seen from this machine"
    return state.state, state.reason


def _locked(run: Path) -> bool:
    """Whether a process that this machine can see is training this run."""
    try:
        with (run / ".lock").open("r") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _add_measurements(standing: Standing, run: Path, *, alive: bool) -> None:
    row = _last_training_row(run / "metrics.jsonl")
    if not row:
        return
    standing.loss, standing.step = row.get("loss"), max(standing.step, row["step"])
    standing.images_per_second = row.get("images_per_second")
    if alive and standing.total_steps and standing.images_per_second:
        per_step = row["samples_seen"] / row["step"]
        left = (standing.total_steps - standing.step) * per_step
        standing.eta_s = round(left / standing.images_per_second, 1)


def _last_training_row(metrics: Path) -> dict[str, Any]:
    try:
        with metrics.open("rb") as handle:
            handle.seek(max(0, metrics.stat().st_size - TAIL_BYTES))
            lines = handle.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        row = json_object(line)  # None: cut at the front by us, or at the end by a crash
        if is_measurement(row) and row["kind"] == "train" and row.get("step", 0) > 0:
            return row
    return {}
