"""The batch script: submitit writes it, or ``pretrain.sbatch`` is filled in where there is no submitit.

Both run the same: ``slurm.incarnation begin``, srun with one ``slurm.job`` per GPU, ``slurm.incarnation end``.
"""

import contextlib
import io
import shlex
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.outcome import UserError
from slurm.folder import SlurmFolder
from slurm.job import Job
from slurm.scheduler import UnreachedError, failure

if TYPE_CHECKING:
    import submitit

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = Path(__file__).with_name("pretrain.sbatch")


def sbatch_options(options: Namespace, name: str) -> dict[str, str | bool]:
    """What sbatch is asked for, by the names of its options.

    Args:
        options: of ``slurm.launch``.
        name: of the job.
    """
    asked: dict[str, str | int | bool | None] = {
        "job-name": name,
        "nodes": options.nodes if options.min_nodes == options.nodes else f"{options.min_nodes}-{options.nodes}",
        # Tasks are counted when it starts: had sbatch been told of them, Slurm would give the fewest nodes of a range.
        "gpus-per-node": options.gpus_per_node,
        "cpus-per-gpu": options.cpus_per_gpu,
        "mem": options.mem,
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "constraint": options.constraint,
        "exclude": options.exclude,
        "signal": f"USR2@{options.save_within}",
        "requeue": True,
    }
    return {key: value if value is True else str(value) for key, value in asked.items() if value is not None}


def executor_for(options: Namespace, folder: SlurmFolder, name: str) -> "submitit.SlurmExecutor":
    """Make submitit's executor for a run.

    Raises:
        UserError: submitit or Slurm is not installed here.
    """
    try:
        import submitit  # noqa: PLC0415 - sites without it use the plain script
    except ImportError:
        raise UserError("submitit is not installed: pip install submitit, or use --plain") from None
    try:
        executor = submitit.SlurmExecutor(folder.submitit, python=task_python(options))
    except RuntimeError:
        raise UserError(
            "srun: no such command: this is not a machine of a Slurm cluster; --local runs the same job here"
        ) from None
    run = shlex.quote(str(folder.run))
    python = shlex.quote(sys.executable)
    executor.update_parameters(
        setup=[
            *options.setup,
            f"cd {shlex.quote(str(ROOT))} || exit 1",
            "trap '' TERM  # what follows srun must still be done when the job is taken away",
            f"prepared=$({python} -m slurm.incarnation begin {run}) || exit $?",
            'eval "$prepared"',
        ],
        teardown=[f"{python} -m slurm.incarnation end {run} --status $?", "exit $?"],
        stderr_to_stdout=True,
        additional_parameters=sbatch_options(options, name),
    )
    return executor


def submit(executor: "submitit.SlurmExecutor", job: Job) -> "submitit.Job[None]":
    """Submit a run's first job.

    Raises:
        SlurmError: Slurm refused it, or did not answer.
    """
    from submitit.core.utils import FailedJobError  # noqa: PLC0415

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # where submitit prints what it raises
            return executor.submit(job)
    except FailedJobError as error:
        failed = failure("sbatch", str(error))
        if isinstance(failed, UnreachedError):
            failed.args = (f"{failed}; it may have been heard: look with squeue --me, scancel it, then launch again",)
        raise failed from None


def task_python(options: Namespace) -> str:
    """Shell words that start Python in a task."""
    return f"{options.container} {options.container_python}" if options.container else shlex.quote(sys.executable)


def submitit_script(executor: "submitit.SlurmExecutor") -> str:
    """The script that submitit would submit."""
    command = executor._submitit_command_str  # noqa: SLF001 - submitit has no public way to see it
    return executor._make_submission_file_text(command, "dry-run")  # noqa: SLF001


def plain_script(options: Namespace, folder: SlurmFolder, name: str) -> str:
    """``pretrain.sbatch`` for a run."""
    asked = sbatch_options(options, name) | {"output": str(folder.own / "job-%j.out"), "open-mode": "append"}
    lines = [f"#SBATCH --{key}" + ("" if value is True else f"={value}") for key, value in asked.items()]
    filled = {
        "@SBATCH@": "\n".join(lines),
        "@SETUP@": "\n".join(options.setup),
        "@ROOT@": shlex.quote(str(ROOT)),
        "@RUN@": shlex.quote(str(folder.run)),
        "@SCRIPT@": shlex.quote(str(folder.plain_script)),
        "@PYTHON@": shlex.quote(sys.executable),
        "@TASK_PYTHON@": task_python(options),
    }
    text = TEMPLATE.read_text()
    for mark, value in filled.items():
        text = text.replace(mark, value)
    return text
