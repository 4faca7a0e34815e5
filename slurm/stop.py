"""Stop a run and save: ``python -m slurm.stop RUN``."""

import argparse
import getpass
import sys
from pathlib import Path

from pretrain.outcome import ExitCode, UserError
from slurm import scheduler
from slurm.folder import SlurmFolder, stamp
from slurm.job_state import job_of


def stop(folder: SlurmFolder) -> str:
    """Ask a run to stop; what was done, in one line. Even where Slurm refuses (SlurmError), nothing restarts it."""
    if not folder.launch.exists():
        raise UserError(
            f"{folder.run} was not started by slurm.launch: press Ctrl-C where it was started, or send it SIGTERM"
        )
    state = folder.state()
    if state is not None and state.state == "finished":
        return "the run is already finished"
    folder.request_stop(f"stopped with slurm.stop by {getpass.getuser()}, {stamp()}")  # first: it outlives us
    job = job_of(folder, folder.attempts(), scheduler.queue(retry_s=scheduler.PATIENCE_S))
    if job is None or job.over:
        return "the run has no job, and nothing restarts it until it is launched again"
    if job.state == "RUNNING":
        scheduler.cancel(job.id, signal="USR2")
        return f"requested: the ranks of job {job.id} save and end at the next step; slurm.status shows when"
    scheduler.cancel(job.id)
    return f"job {job.id} was {job.state.lower()} and is cancelled"


def main(arguments: list[str] | None = None) -> int:
    """Stop a run: its ranks save and exit, and nothing restarts it. `slurm.launch` with the same recipe resumes it."""
    parser = argparse.ArgumentParser(prog="python -m slurm.stop", description=main.__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="runs/NAME")
    folder = SlurmFolder(parser.parse_args(arguments).run.resolve())
    try:
        print(stop(folder))  # noqa: T201
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return error.code
    return ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(main())
