"""Let runs go on that Slurm holds or has ended by itself: ``python -m slurm.release [RUN]``; for cron.

When a launch fails (a prolog fails, a node that is being repaired refuses, slurmctld was killed as it started the job),
Slurm requeues the job and holds it until someone releases it. When the batch script is killed, or its host dies where
jobs may not be requeued, the job ends. Nothing of it is alive then that could do anything about it.
"""

import argparse
import sys
from pathlib import Path

from pretrain.files import lock
from pretrain.outcome import ExitCode, UserError
from slurm import scheduler
from slurm.folder import SlurmFolder, stamp
from slurm.history import Chapter, History, current_job, ended_job
from slurm.incarnation import copy_submission
from slurm.restart import nodes_to_exclude
from slurm.scheduler import Job, SlurmError
from slurm.standing import find_runs, standing_of

SUBMITTED_AGAIN = "submitted again"

DESCRIPTION = """\
Release the jobs of runs that Slurm holds since it could not launch them, and submit again those that ended without a
word of their batch script, while Slurm still tells how (for MinJobAge, mostly 5 minutes). What a person or an
administrator holds stays held, what was cancelled stays cancelled, and what failed more often in a row than
--max-restarts of slurm.launch allows is left alone. Anybody may do it for jobs of his own: let cron or scrontab do it.

  */2 * * * * cd REPOSITORY && .venv/bin/python -m slurm.release --runs RUNS
"""


def release(folder: SlurmFolder, queue: dict[str, Job]) -> str:
    """Release the job of a run if Slurm holds it because a launch failed, or submit one in place of a dead one.

    Returns:
        what was done, in one line; "" for nothing.

    Raises:
        SlurmError: Slurm did not take the order.
    """
    history = History(folder.history)
    chapters = history.chapters()
    last, job = chapters[-1] if chapters else None, current_job(folder, chapters, queue)
    if job is None:
        return _submit_again(folder, history, last, queue)
    if not job.launch_failed:
        return ""
    if folder.stop_request():
        return f"{folder.run}: job {job.id} stays held: {folder.stop_request()}"
    failed, limit = failed_launches(job, last), folder.read_launch().policy.max_restarts
    if failed > limit:
        return (
            f"{folder.run}: job {job.id} stays held: {failed} launches in a row failed; `sinfo -R` tells what is wrong "
            f"with the nodes, then: scontrol release {job.id}"
        )
    scheduler.release(job.id)
    if last is not None:
        history.note(last.incarnation, f"held since a launch failed; released {stamp()}")
    return f"{folder.run}: job {job.id} was held since a launch failed, and is released"


def _submit_again(folder: SlurmFolder, history: History, last: Chapter | None, queue: dict[str, Job]) -> str:
    """Submit the script of a run again whose job ended otherwise than by it or by a person; a line, or ""."""
    gone = ended_job(folder, last, queue)
    if gone is None or not gone.failed or standing_of(folder.run, queue).state != "lost":
        return ""
    held = lock(folder.release_lock)
    if held is None:
        return f"{folder.run}: another slurm.release is at it"
    with held:
        queue = scheduler.queue(retry_s=scheduler.PATIENCE_S)
        if standing_of(folder.run, queue).state != "lost":  # somebody has launched it meanwhile
            return ""
        return _submit_in_place_of(gone, folder, history, last)


def _submit_in_place_of(gone: Job, folder: SlurmFolder, history: History, last: Chapter | None) -> str:
    """Submit the script of a dead job again, unless that was done too often; a line."""
    tries = sum(SUBMITTED_AGAIN in note for note in last.notes) if last else len(folder.submitted()) - 1
    how = f"{folder.run}: job {gone.id} ended as {gone.state} without a word"
    if tries >= folder.read_launch().policy.max_restarts:
        return f"{how} and stays lost: submitted again {tries} times in a row without a start; launch it again"
    script = folder.submitit / f"{gone.id}_submission.sh"
    follower = scheduler.submit(
        script if script.exists() else folder.plain_script, exclude=nodes_to_exclude(history.past(None))
    )
    copy_submission(folder, gone.id, follower)
    if last is not None:
        text = f"job {gone.id} ended as {gone.state} without a word; {SUBMITTED_AGAIN} as job {follower} {stamp()}"
        history.note(last.incarnation, text, next_job=follower)
    return f"{how} and is submitted again as job {follower}"


def failed_launches(job: Job, last: Chapter | None) -> int:
    """How many launches of a job have failed since it ran last; Slurm counts every one as a restart."""
    restarts = int(scheduler.show_job(job.id, retry_s=scheduler.PATIENCE_S).get("Restarts", "0"))
    ran = last.restart + 1 if last is not None and last.job == job.id else 0
    return restarts - ran


def main(arguments: list[str] | None = None) -> int:
    """Let runs go on that Slurm holds or has ended by itself."""
    parser = argparse.ArgumentParser(
        prog="python -m slurm.release", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN", help="runs/NAME (default: all runs)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="default: runs")
    options = parser.parse_args(arguments)
    folders = [options.run] if options.run else find_runs(options.runs)
    status = ExitCode.FINISHED
    try:
        queue = scheduler.queue(retry_s=scheduler.PATIENCE_S)
    except SlurmError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return ExitCode.RETRY
    for folder in folders:
        try:
            if done := release(SlurmFolder(folder.resolve()), queue):
                print(done)  # noqa: T201
        except (UserError, SlurmError, OSError) as error:  # the other runs are released all the same
            print(f"error: {folder}: {error}", file=sys.stderr)  # noqa: T201
            status = ExitCode.RETRY
    return status


if __name__ == "__main__":
    sys.exit(main())
