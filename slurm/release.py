"""Requeue runs that Slurm holds, has ended, or has too few nodes for.

Release the jobs of runs that Slurm holds because it could not launch them, and resubmit those whose batch script was
killed, while Slurm still knows how they ended (for MinJobAge, usually 5 minutes). A job that waits for nodes may use
those again that failed twice in its run. Jobs that a user or an administrator holds stay held, cancelled ones stay
cancelled, and a run that failed more often in a row than --max-restarts of slurm.launch allows is left alone. Every
user may do this for their own jobs; let cron or scrontab call it.

  */2 * * * * cd REPOSITORY && .venv/bin/python -m slurm.release --runs RUNS
"""

import argparse
import sys
from pathlib import Path

from pretrain.files import lock
from pretrain.outcome import ExitCode, UserError
from slurm import scheduler
from slurm.folder import SlurmFolder, stamp
from slurm.job_state import RunStatus, find_state
from slurm.restart import nodes_to_exclude
from slurm.scheduler import Job, SlurmError
from slurm.status import UNREADABLE, find_runs


def release(folder: SlurmFolder, queue: dict[str, Job]) -> str:
    """Apply the remedy for a run's job, if there is one; what was done, in one line. A SlurmError if Slurm refuses."""
    found = find_state(folder, queue)
    if found.remedy == "release":
        return _release_held(folder, found)
    if found.remedy == "include":
        return _include_again(folder, found)
    if found.remedy == "submit":
        held = lock(folder.own / "release.lock")
        if held is None:
            return f"{folder.run}: another slurm.release is resubmitting it"
        with held:
            return _submit_again(folder)
    return ""


def _release_held(folder: SlurmFolder, found: RunStatus) -> str:
    """Release a job that Slurm could not launch, unless that was so too often; a line."""
    job, last = found.job, found.history[-1] if found.history else None
    # Slurm counts every launch as a restart; these came after the job ran last.
    restarts = int(scheduler.show_job(job, retry_s=scheduler.PATIENCE_S).get("Restarts", "0"))
    failed = restarts - (last.restart + 1 if last is not None and last.job == job else 0)
    if failed > folder.read_launch().policy.max_restarts:
        return (
            f"{folder.run}: job {job} stays held: {failed} launches in a row failed; `sinfo -R` shows what is wrong "
            f"with the nodes, then: scontrol release {job}"
        )
    scheduler.release(job)
    if last is not None:
        folder.note(last.attempt, f"held since a launch failed; released {stamp()}")
    return f"{folder.run}: job {job} was held since a launch failed, and is released"


def _include_again(folder: SlurmFolder, found: RunStatus) -> str:
    """Let a job that lacks nodes have those that the run avoids: rather them than none; a line."""
    script = folder.script(found.job)
    kept = scheduler.excluded(script)
    now = scheduler.show_job(found.job, retry_s=scheduler.PATIENCE_S).get("ExcNodeList", "")
    avoided = sorted({*nodes_to_exclude(found.history)} & {*scheduler.expand(now)} - {*scheduler.expand(kept)})
    if not avoided or scheduler.avoidable(script, avoided):  # it waits for another reason, such as maintenance
        return ""
    scheduler.update(found.job, f"ExcNodeList={kept}")
    text = f"{', '.join(avoided)} may be used again: the other nodes are too few"
    folder.note(found.history[-1].attempt, f"{text} {stamp()}")
    return f"{folder.run}: job {found.job} waits for nodes; {text}"


def _submit_again(folder: SlurmFolder) -> str:
    """Submit the script of a run again whose job ended without a successor, unless that was so too often; a line."""
    queue = scheduler.queue(retry_s=scheduler.PATIENCE_S)
    found, launch = find_state(folder, queue), folder.read_launch()
    if found.remedy != "submit":  # it was launched again by hand
        return ""
    last, gone = found.history[-1] if found.history else None, queue.get(found.job)
    tries = last.submitted_again if last else len(folder.submitted()) - 1
    ended = f"job {found.job} ended" + (f" as {gone.state}" if gone else "")
    ended += " and could not be started again" if last and last.action == "release" else " without a word"
    if tries >= launch.policy.max_restarts:
        return (
            f"{folder.run}: {ended} and stays lost: submitted again {tries} times in a row without a start; launch it "
            "again"
        )
    script = folder.script(found.job)
    exclude = scheduler.avoidable(script, nodes_to_exclude(found.history))
    follower = scheduler.submit(script, launch.environment, exclude=exclude)
    folder.adopt(follower)
    if last is not None:
        text = f"{ended}; submitted again as job {follower} {stamp()}"
        folder.note(last.attempt, text, next_job=follower, again=True)
    return f"{folder.run}: {ended} and is submitted again as job {follower}"


def main(arguments: list[str] | None = None) -> int:
    """Requeue runs that Slurm holds, has ended, or has too few nodes for."""
    parser = argparse.ArgumentParser(
        prog="python -m slurm.release", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN", help="runs/NAME (default: all runs)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="default: runs")
    options, status = parser.parse_args(arguments), ExitCode.FINISHED
    try:
        queue = scheduler.queue(retry_s=scheduler.PATIENCE_S)
    except SlurmError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return ExitCode.RETRY
    for folder in [options.run] if options.run else find_runs(options.runs):
        try:
            if done := release(SlurmFolder(folder.resolve()), queue):
                print(done)  # noqa: T201
        except (UserError, *UNREADABLE) as error:  # the other runs are released all the same
            print(f"error: {folder}: {error}", file=sys.stderr)  # noqa: T201
            status = ExitCode.RETRY
    return status


if __name__ == "__main__":
    sys.exit(main())
