"""The batch script: submitit writes it, with our two ends of an incarnation around its srun."""

import shlex
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import submitit

from pretrain.outcome import UserError
from slurm.folder import SlurmFolder

ROOT = Path(__file__).resolve().parent.parent


def executor_for(options: Namespace, folder: SlurmFolder, name: str) -> submitit.SlurmExecutor:
    """Make submitit's executor for a run.

    Args:
        options: of ``slurm.launch``.
        folder: the run.
        name: of the job.

    Raises:
        UserError: Slurm is not installed here.
    """
    python = shlex.quote(sys.executable)
    if options.container:
        python = f"{options.container} {options.container_python}"
    try:
        executor = submitit.SlurmExecutor(folder.submitit, python=python)
    except RuntimeError:
        raise UserError(
            "srun: no such command: this is not a machine of a Slurm cluster; --local runs the same job here"
        ) from None
    nodes = str(options.nodes) if options.min_nodes == options.nodes else f"{options.min_nodes}-{options.nodes}"
    more: dict[str, Any] = {"nodes": nodes, "time": options.time, "requeue": True}
    if options.mem:
        more["mem"] = options.mem
    executor.update_parameters(
        job_name=name,
        nodes=options.nodes,
        ntasks_per_node=options.gpus_per_node,
        gpus_per_node=options.gpus_per_node,
        cpus_per_task=options.cpus_per_gpu,  # one task per GPU
        partition=options.partition,
        account=options.account,
        qos=options.qos,
        constraint=options.constraint,
        exclude=options.exclude,
        signal_delay_s=options.save_within,
        setup=[*options.setup, *before_srun(folder)],
        teardown=after_srun(folder),
        stderr_to_stdout=True,
        additional_parameters=more,
    )
    return executor


def before_srun(folder: SlurmFolder) -> list[str]:
    """Lines before srun."""
    run = shlex.quote(str(folder.run))
    return [
        f"cd {shlex.quote(str(ROOT))} || exit 1",
        "trap '' TERM  # what follows srun must still be done when the job is taken away",
        f"prepared=$({shlex.quote(sys.executable)} -m slurm.incarnation begin {run}) || exit $?",
        'eval "$prepared"',
    ]


def after_srun(folder: SlurmFolder) -> list[str]:
    """Lines after srun."""
    run = shlex.quote(str(folder.run))
    return [f"{shlex.quote(sys.executable)} -m slurm.incarnation end {run} --status $?", "exit $?"]


def script_text(executor: submitit.SlurmExecutor) -> str:
    """The script that would be submitted."""
    command = executor._submitit_command_str  # noqa: SLF001 - submitit has no public way to see it
    return executor._make_submission_file_text(command, "dry-run")  # noqa: SLF001
