"""What has become of a run and of its job: all that decides about it from the run's folder and from Slurm's queue.

Neither the folder nor Slurm is believed alone. What follows an attempt is decided by ``slurm.restart``.
"""

import fcntl
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pretrain import run_state
from slurm import scheduler
from slurm.attempt_records import AttemptRecord
from slurm.folder import SlurmFolder
from slurm.restart import JobState
from slurm.scheduler import Job

Remedy = Literal["", "release", "submit"]
"""What ``slurm.release`` can do: release a job that Slurm holds, or submit one in place of a dead one."""


def job_state(job: str, restart: int, *, save_within_s: int, node_down: bool) -> JobState:
    """What Slurm is about to do with a job whose ranks have just ended.

    A job that is being torn down shows as COMPLETING, whatever the cause, so the cause is read from its other fields.

    Args:
        job: its id.
        restart: its SLURM_RESTART_COUNT.
        save_within_s: so long before the time limit it was told to stop.
        node_down: whether one of its nodes is down.
    """
    facts = scheduler.show_job(job, retry_s=scheduler.OUTAGE_S)
    if not facts:  # a job that was cancelled is known until its batch script has ended, if its node has not gone before
        return "cancelled" if node_down else "forgotten"
    if int(facts.get("Restarts", "0")) > restart or facts["JobState"] in ("PENDING", "REQUEUED", "REQUEUE_HOLD"):
        return "requeued"
    preempted, started = facts.get("PreemptTime", ""), facts.get("StartTime", "")
    if preempted.isdigit() and started.isdigit() and int(preempted) >= int(started):
        return "preempted"
    if facts["Reason"] in ("NodeDown", "NodeFail"):
        return "node lost"
    running = facts["JobState"] in ("RUNNING", "SIGNALING", "SUSPENDED", "STOPPED")
    limit = _seconds(facts.get("TimeLimit", ""))
    told = limit - save_within_s - 60 if running else limit  # Slurm may send the signal up to a minute early
    if facts["Reason"] == "TimeLimit" or (limit and _seconds(facts["RunTime"]) >= told):
        return "time limit"
    if running:
        return "running"
    return "node lost" if node_down else "cancelled"


def _seconds(duration: str) -> int:
    """``1-02:03:04`` in seconds; 0 for what is no duration, such as UNLIMITED."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", duration)
    if not found:
        return 0
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def current_job(folder: SlurmFolder, records: list[AttemptRecord], queue: dict[str, Job]) -> Job | None:
    """The job of a run that runs, else the one that waits; None when there is none. ``queue`` is what Slurm knows.

    Whoever submitted it may not have lived to write that down, so jobs are known by their script, too.
    """
    mine = {*folder.submitted(), *(r.job for r in records), *(r.next_job for r in records)}
    begun = records[-1].job if records else ""
    alive = [job for job in queue.values() if not job.over and (job.id in mine or folder.is_script(job.command))]
    return max(alive, key=lambda job: (job.state != "PENDING", job.id == begun, int(job.id)), default=None)


def running_attempt(records: list[AttemptRecord], queue: dict[str, Job], *, but: str) -> AttemptRecord | None:
    """The attempt that runs now, if it is of another job than ``but``."""
    last = records[-1] if records else None
    job = queue.get(last.job) if last and not last.ended and last.job != but else None
    return last if job is not None and job.state == "RUNNING" else None


def _ended_job(folder: SlurmFolder, last: AttemptRecord | None, queue: dict[str, Job]) -> Job | None:
    """The newest job of a run that has ended and that Slurm has not forgotten yet."""
    ids = [*folder.submitted(), *([last.job, last.next_job] if last else [])]
    return next((queue[job] for job in sorted(ids, key=_number, reverse=True) if job in queue), None)


def _number(job: str) -> int:
    return int(job) if job.isdigit() else 0


@dataclass(frozen=True)
class Found:
    """The state of a run."""

    state: str
    """waiting, held, starting, running, stopping, restarting, finished, stopped, cancelled, failed, lost or unknown."""
    why: str = ""
    job: Job | None = None
    """That runs, waits, or has ended last."""
    remedy: Remedy = ""


def find_state(folder: SlurmFolder, records: list[AttemptRecord], queue: dict[str, Job] | None) -> Found:
    """The state of a run.

    Args:
        folder: its folder.
        records: its attempts.
        queue: the jobs that Slurm knows; None where there is no Slurm.
    """
    state = folder.state()
    last = records[-1] if records else None
    if state is not None and state.state == "finished":
        return Found("finished")
    job = current_job(folder, records, queue or {})
    if job is None:
        return _without_job(folder, state, last, queue)
    reason = last.reason if last else ""
    if folder.stop_request():
        return Found("stopping", folder.stop_request(), job)
    if job.state == "PENDING":
        before = f"; before: {reason}" if reason else ""
        if job.held:
            return Found("held", _who_releases(folder, job) + before, job, "release" if job.launch_failed else "")
        return Found("waiting", f"Slurm: {job.reason}{before}", job)
    before = next((record.reason for record in reversed(records[:-1]) if record.reason), "")
    if last is None or (last.ended and job.state != "COMPLETING"):
        return Found("starting", reason, job)
    if last.ended:
        return Found("restarting" if last.action in ("leave", "requeue") else "stopping", reason, job)
    if job.state == "COMPLETING":
        return Found("stopping", before, job)
    if state is None or state.updated < last.begun:
        return Found("starting", before, job)
    if state.state != "running":
        return Found("stopping", state.reason, job)
    return Found("running", before, job)


def _who_releases(folder: SlurmFolder, job: Job) -> str:
    """Why a job is held, and how it goes on."""
    if job.launch_failed:
        return f"Slurm could not launch it and holds it: `python -m slurm.release {folder.run}` lets it go on"
    if job.reason == "JobHeldAdmin":
        return f"an administrator holds it, who alone can let it go on: `scontrol release {job.id}`"
    return f"Slurm: {job.reason}; `scontrol release {job.id}` lets it go on"


def _without_job(
    folder: SlurmFolder,
    state: run_state.RunState | None,
    last: AttemptRecord | None,
    queue: dict[str, Job] | None,
) -> Found:
    """State of a run that has no job which runs or waits."""
    if last is None and not folder.launched():
        return _started_by_hand(folder, state)
    final = last is not None and last.ended and last.action in ("none", "cancel")
    if final and last is not None and last.cause not in ("stopped", "cancelled"):
        return Found("failed", last.reason)
    if folder.stop_request():  # a launch withdraws it, so it is newer than what the last one came to
        return Found("stopped", folder.stop_request())
    if final and last is not None:
        return Found(str(last.cause), last.reason)
    if queue is None and last is not None and last.ended:
        return Found("restarting", f"{last.reason}; Slurm could not be asked")
    if queue is None:
        return Found(state.state if state else "unknown", "as its folder says; Slurm could not be asked")
    gone = _ended_job(folder, last, queue)
    if gone is not None and gone.state == "CANCELLED":
        return Found("cancelled", f"job {gone.id} was cancelled", gone)
    put_off = last is not None and last.action == "release" and not last.next_job
    remedy: Remedy = "submit" if put_off or (gone and gone.failed) else ""
    what = f"job {gone.id} ended as {gone.state}" if gone else "its job is gone from the queue"
    again = f"`python -m slurm.release {folder.run}`" if remedy else "launch it again"
    before = f"; before: {last.reason}" if last and last.reason else ""
    return Found("lost", f"{what}, and nothing goes on in its place: {again}{before}", gone, remedy)


def _started_by_hand(folder: SlurmFolder, state: run_state.RunState | None) -> Found:
    if state is None:
        return Found("unknown", "run.json cannot be read")
    if state.state == "running" and not _locked(folder.run):
        why = f"run.json says running, but no process of {state.host} holds the run; seen from this machine"
        return Found("lost", why)
    return Found(state.state, state.reason)


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
