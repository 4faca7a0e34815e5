"""The batch script, which submitit writes.

It calls ``slurm.attempt begin``, srun with one ``slurm.job`` per GPU, and ``slurm.attempt end``.
"""

import contextlib
import io
import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pretrain.outcome import UserError
from slurm.attempt import ROOT
from slurm.folder import SlurmFolder
from slurm.job import Job
from slurm.scheduler import KEPT, UnreachedError, failure

if TYPE_CHECKING:
    import submitit

SITE = ("account", "partition", "qos", "constraint", "reservation", "wckey")
"""Options that sbatch also takes from the environment, as SBATCH_ACCOUNT, and that a site or a user may set there."""
OWN = (
    "array",
    "error",
    "no_requeue",
    "nodes",
    "ntasks",
    "ntasks_per_node",
    "open_mode",
    "output",
    "requeue",
    "signal",
    "wrap",
)
"""Options without which a run does not recover."""


def sbatch_options(options: Namespace, environment: Mapping[str, str]) -> dict[str, Any]:
    """What sbatch is asked for, by the names of its options with underscores; True for one without a value.

    Args:
        options: of ``slurm.launch``.
        environment: of which SBATCH_ACCOUNT and the like are taken where the options do not set it.

    Raises:
        UserError: an option cannot be given, or has a line break.
    """
    asked = {name: environment.get(f"SBATCH_{name.upper()}") for name in SITE} | {
        # Tasks are counted when it starts: if sbatch knew them, Slurm would give the fewest nodes of a range.
        "nodes": options.nodes if options.min_nodes == options.nodes else f"{options.min_nodes}-{options.nodes}",
        "gpus_per_node": options.gpus_per_node,
        "cpus_per_gpu": options.cpus_per_gpu,
        "time": options.time,
        "requeue": True,
    }
    given = {name: getattr(options, name, None) for name in (*SITE, "mem", "exclude")}
    asked |= {name: value for name, value in given.items() if value is not None}
    for assignment in options.sbatch:
        key, equals, value = assignment.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if key in OWN:
            raise UserError(f"--sbatch {key}: slurm.launch sets it itself")
        asked[key] = value if equals else True
    for key, value in asked.items():
        if "\n" in f"{key}{value}":
            raise UserError(f"{key.replace('_', '-')} has a line break, which no option of sbatch may have: {value!r}")
    return {key: value for key, value in asked.items() if value not in (None, "")}


def executor_for(options: Namespace, folder: SlurmFolder, name: str) -> "submitit.SlurmExecutor":
    """Make submitit's executor for a run, whose job is called ``name``.

    Raises:
        UserError: Slurm is not installed here, or an option cannot be given.
    """
    import submitit  # noqa: PLC0415 - slow

    run, python = shlex.quote(str(folder.run)), shlex.quote(sys.executable)
    in_task = f"{options.container} {options.container_python}" if options.container else python

    try:
        executor = submitit.SlurmExecutor(folder.submitit, python=in_task)
    except RuntimeError:
        raise UserError(
            "srun: no such command: this is not a machine of a Slurm cluster; `deepspeed pretrain/main.py` trains here"
        ) from None
    executor.update_parameters(
        job_name=name,
        wckey=None,
        signal_delay_s=options.save_within,
        setup=[
            *options.setup,
            f"cd {shlex.quote(str(ROOT))} || exit 1",
            "trap '' TERM  # what follows srun must still be done when the job is taken away",
            f"prepared=$({python} -m slurm.attempt begin {run}) || exit $?",
            'eval "$prepared"',
        ],
        teardown=[f"{python} -m slurm.attempt end {run} --status $? 2>&3", "exit $?"],
        stderr_to_stdout=True,
        additional_parameters=sbatch_options(options, os.environ),
    )
    return executor


def ignored_variables(environment: Mapping[str, str]) -> list[str]:
    """Variables for sbatch and srun that would contradict what is asked for."""
    site = {f"SBATCH_{name.upper()}" for name in SITE} | set(KEPT)
    return sorted(name for name in environment if name.startswith(("SLURM_", "SBATCH_", "SRUN_")) and name not in site)


def submit(executor: "submitit.SlurmExecutor", job: Job) -> "submitit.Job[None]":
    """Submit a run's first job, without the environment's variables for sbatch and srun.

    Raises:
        SlurmError: Slurm refused it, or did not answer.
    """
    from submitit.core.utils import FailedJobError  # noqa: PLC0415
    from submitit.helpers import clean_env  # noqa: PLC0415

    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    try:
        with clean_env(), contextlib.redirect_stderr(io.StringIO()):  # where submitit prints what it raises
            os.environ.update(kept)
            return executor.submit(job)
    except FailedJobError as error:
        failed = failure("sbatch", str(error))
        if isinstance(failed, UnreachedError):
            failed.args = (f"{failed}; the job may exist: check `squeue --me`, cancel it, then launch again",)
        raise failed from None


def submitit_script(executor: "submitit.SlurmExecutor") -> str:
    """The script that submitit would submit."""
    command = executor._submitit_command_str  # noqa: SLF001 - submitit has no public way to see it
    return executor._make_submission_file_text(command, "dry-run")  # noqa: SLF001
