"""Let runs go on that Slurm holds because it could not launch them: ``python -m slurm.release [RUN]``; for cron.

When a launch fails (a prolog fails, a node that is being repaired refuses, slurmctld was killed as it started the job),
Slurm requeues the job and holds it until someone releases it. Nothing of the job is alive then that could do it.
"""

import argparse
import sys
from pathlib import Path

from pretrain.outcome import ExitCode, UserError
from slurm import scheduler
from slurm.folder import SlurmFolder, stamp
from slurm.history import Chapter, History, current_job
from slurm.scheduler import Job, SlurmError
from slurm.standing import find_runs

DESCRIPTION = """\
Release the jobs of runs that Slurm holds since it could not launch them. What a person or an administrator holds stays
held, and so does a run whose launches have failed more often in a row than --max-restarts of slurm.launch allows.
Anybody may do it for jobs of his own, so let cron or scrontab do it every few minutes:

  */5 * * * * cd REPOSITORY && .venv/bin/python -m slurm.release --runs RUNS
"""


def release(folder: SlurmFolder, queue: dict[str, Job]) -> str:
    """Release the job of a run if Slurm holds it because a launch failed; what was done in one line, "" for nothing.

    Raises:
        SlurmError: Slurm did not take the order.
    """
    history = History(folder.history)
    chapters = history.chapters()
    job = current_job(folder, chapters, queue)
    if job is None or not job.launch_failed:
        return ""
    last = chapters[-1] if chapters else None
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


def failed_launches(job: Job, last: Chapter | None) -> int:
    """How many launches of a job have failed since it ran last; Slurm counts every one as a restart."""
    restarts = int(scheduler.show_job(job.id).get("Restarts", "0"))
    ran = last.restart + 1 if last is not None and last.job == job.id else 0
    return restarts - ran


def main(arguments: list[str] | None = None) -> int:
    """Let runs go on that Slurm holds because it could not launch them."""
    parser = argparse.ArgumentParser(
        prog="python -m slurm.release", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN", help="runs/NAME (default: all runs)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="default: runs")
    options = parser.parse_args(arguments)
    folders = [options.run] if options.run else find_runs(options.runs)
    status = ExitCode.FINISHED
    try:
        queue = scheduler.queue()
    except SlurmError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return ExitCode.RETRY
    for folder in folders:
        try:
            if done := release(SlurmFolder(folder.resolve()), queue):
                print(done)  # noqa: T201
        except (UserError, SlurmError) as error:  # the other runs are released all the same
            print(f"error: {folder}: {error}", file=sys.stderr)  # noqa: T201
            status = ExitCode.RETRY
    return status


if __name__ == "__main__":
    sys.exit(main())
