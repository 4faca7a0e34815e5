"""What has become of a run and of its job: all that decides about it from the run's folder and from Slurm's queue.

Neither the folder nor Slurm is believed alone. What follows an attempt is decided by ``slurm.restart``.
"""

import fcntl
import re
from dataclasses import dataclass, field
from pathlib import Path

from pretrain.run_state import RunState
from slurm import scheduler
from slurm.folder import SlurmFolder
from slurm.restart import AttemptRecord, JobState, nodes_to_exclude
from slurm.scheduler import FAILED, Job

LACKS_NODES = ("ReqNodeNotAvail", "BadConstraints")
"""Reasons of a job that waits for nodes that are down, drained or excluded."""


def job_state(job: str, restart: int, *, save_within_s: int, node_down: bool) -> JobState:
    """What Slurm is about to do with a job whose ranks have just ended.

    A job that is being torn down shows as COMPLETING, whatever the cause, so the cause is read from its other fields.
    It was asked to stop ``save_within_s`` before its time limit.
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
    asked = limit - save_within_s - 60 if running else limit  # Slurm may send the signal up to a minute early
    if facts["Reason"] == "TimeLimit" or (limit and _seconds(facts["RunTime"]) >= asked):
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


def job_of(folder: SlurmFolder, records: list[AttemptRecord], queue: dict[str, Job]) -> Job | None:
    """The job of a run that runs, else the one that waits, else the one that ended last, of all that Slurm knows.

    The process that submitted it may have died before it recorded that, so jobs are known by their script, too.
    """
    known = {*folder.submitted(), *(r.job for r in records), *(r.next_job for r in records)}
    own = [job for job in queue.values() if job.id in known or job.command.startswith(f"{folder.own}/")]
    begun = records[-1].job if records else ""
    active = [job for job in own if not job.over]
    return max(active or own, key=lambda job: (job.state != "PENDING", job in active and job.id == begun, int(job.id)),
               default=None)  # fmt: skip


@dataclass
class RunStatus:
    """A run, for a table or for ``--json``. Unknown numbers are None."""

    name: str
    state: str
    """waiting, held, starting, running, stopping, restarting, finished, stopped, cancelled, failed, lost or unknown."""
    why: str = ""
    """What it waits for, or why it ended or was started again last."""
    job: str = ""
    """That runs, waits, or has ended last."""
    remedy: str = ""
    """Of ``slurm.release``: "release" a job that Slurm holds, "include" nodes that the run avoids in one that lacks
    nodes, "submit" one in place of a dead one."""
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
    log: str = ""
    """Of rank 0 of the newest attempt."""
    history: list[AttemptRecord] = field(default_factory=list)


def find_state(folder: SlurmFolder, queue: dict[str, Job] | None) -> RunStatus:
    """Name, state, reason, job, remedy and history of a run. ``queue`` is what Slurm knows, None without Slurm."""
    records, run, remedy = folder.attempts(), folder.state(), ""
    job, last = job_of(folder, records, queue or {}), records[-1] if records else None
    if run is not None and run.state == "finished":
        state, why = "finished", ""
    elif job is not None and not job.over:
        state, why = _with_job(folder, run, records, job)
        if state == "held" and job.launch_failed:
            remedy = "release"
        elif state == "waiting" and job.reason.startswith(LACKS_NODES) and nodes_to_exclude(records):
            remedy = "include"
    elif last is None and not folder.launch.exists():
        state, why = _started_by_hand(folder, run)
    else:
        state, why, remedy = _without_job(folder, run, last, job, asked=queue is not None)
    gone = last.next_job or last.job if last else ""
    return RunStatus(folder.run.name, state, why, job.id if job else gone, remedy, history=records)


def _with_job(folder: SlurmFolder, run: RunState | None, records: list[AttemptRecord], job: Job) -> tuple[str, str]:
    if folder.stop_request():
        return "stopping", folder.stop_request()
    last = records[-1] if records else None
    if job.state == "PENDING":
        before = f"; before: {last.reason}" if last and last.reason else ""
        if job.held:
            return "held", _who_releases(folder, job) + before
        return "waiting", f"Slurm: {job.reason}{before}"
    if last is None or (last.ended and job.state != "COMPLETING"):
        return "starting", last.reason if last else ""
    if last.ended:
        return ("restarting" if last.action in ("leave", "requeue") else "stopping"), last.reason
    before = next((record.reason for record in reversed(records) if record.reason), "")
    if job.state == "COMPLETING":
        return "stopping", before
    if run is None or run.updated < last.begun:
        return "starting", before
    return ("running", before) if run.state == "running" else ("stopping", run.reason)


def _who_releases(folder: SlurmFolder, job: Job) -> str:
    """Why a job is held, and how it is released."""
    if job.launch_failed:
        return f"Slurm could not launch it and holds it: `python -m slurm.release {folder.run}` lets it go on"
    if job.reason == "JobHeldAdmin":
        return f"an administrator holds it, and only they can release it: `scontrol release {job.id}`"
    return f"Slurm: {job.reason}; `scontrol release {job.id}` releases it"


def _without_job(
    folder: SlurmFolder, run: RunState | None, last: AttemptRecord | None, gone: Job | None, *, asked: bool
) -> tuple[str, str, str]:
    final = last if last is not None and last.ended and last.action in ("none", "cancel") else None
    if final is not None and final.cause not in ("stopped", "cancelled"):
        return "failed", final.reason, ""
    if folder.stop_request():  # a launch withdraws it, so it is newer than what the last one came to
        return "stopped", folder.stop_request(), ""
    if final is not None:
        return final.cause, final.reason, ""
    if not asked and last is not None and last.ended:
        return "restarting", f"{last.reason}; Slurm did not answer", ""
    if not asked:
        return (run.state if run else "unknown"), "from its folder; Slurm did not answer", ""
    if gone is not None and gone.state == "CANCELLED":
        return "cancelled", f"job {gone.id} was cancelled", ""
    put_off = last is not None and last.action == "release" and not last.next_job
    remedy = "submit" if put_off or (gone and gone.state in FAILED) else ""
    what = f"job {gone.id} ended as {gone.state}" if gone else "its job is gone from the queue"
    again = f"`python -m slurm.release {folder.run}`" if remedy else "launch it again"
    before = f"; before: {last.reason}" if last and last.reason else ""
    return "lost", f"{what}, and no job continues it: {again}{before}", remedy


def _started_by_hand(folder: SlurmFolder, run: RunState | None) -> tuple[str, str]:
    if run is None:
        return "unknown", "run.json cannot be read"
    if run.state == "running" and not _locked(folder.run):
        return "lost", f"run.json says running, but no process of {run.host} holds the lock; seen from this machine"
    return run.state, run.reason


def _locked(run: Path) -> bool:
    """Whether a process that this machine can see is training this run."""
    try:
        with (run / ".lock").open() as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False
