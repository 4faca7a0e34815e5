"""Start a run on a cluster, with automatic recovery: ``python -m slurm.launch --recipe R --nodes 4 ...``."""

import argparse
import contextlib
import os
import re
import shutil
import sys

from pretrain.arguments import add_device_argument, add_run_arguments
from pretrain.outcome import ExitCode, UserError, exit_code
from slurm import scheduler
from slurm.folder import Launch, SlurmFolder
from slurm.job import Job
from slurm.plan import Plan, freeze, make_plan
from slurm.restart import Policy
from slurm.scheduler import SlurmError, UnreachedError
from slurm.script import executor_for, ignored_variables, submit, submitit_script

DESCRIPTION = """\
Start a run on a Slurm cluster, one task per GPU. After preemption, time limits, lost nodes, crashes and hangs it is
restarted and resumes from its newest checkpoint, until it is finished, stopped with `python -m slurm.stop`, or cannot
succeed. `python -m slurm.status` shows its state.
"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m slurm.launch", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    run = parser.add_argument_group("the run (as for pretrain/main.py)")
    add_run_arguments(run, runs="folder that holds the run folders, visible to all nodes")
    add_device_argument(run)
    size = parser.add_argument_group("size")
    size.add_argument("--nodes", type=int, default=1, help="default: 1")
    size.add_argument(
        "--min-nodes",
        type=int,
        help="fewest nodes to continue with when some are gone; the global batch stays the same",
    )
    size.add_argument(
        "--gpus-per-node", required=True, metavar="[TYPE:]N", help="GPUs per node, one task each, such as 8 or h100:8"
    )
    slurm = parser.add_argument_group("Slurm")
    for name in ("partition", "account", "qos", "constraint"):
        slurm.add_argument(f"--{name}", help=f"as sbatch --{name}")
    slurm.add_argument("--time", default="24:00:00", help="limit of one attempt (default: 24:00:00)")
    slurm.add_argument("--cpus-per-gpu", type=int, default=8, help="cores for each task (default: 8)")
    slurm.add_argument("--mem", help="memory per node, for example 500G")
    slurm.add_argument("--exclude", help="nodes to avoid, for example bad1,bad2")
    slurm.add_argument("--sbatch", action="append", default=[], metavar="KEY=VALUE",
                       help="any other option of sbatch, for example gres=gpu:8, exclusive or reservation=R; an empty "
                       "VALUE leaves out what is set here; may be repeated")  # fmt: skip
    slurm.add_argument("--setup", action="append", default=[], metavar="COMMAND",
                       help="shell line before all else, such as 'module load cuda'; may be repeated")  # fmt: skip
    slurm.add_argument("--container", metavar="COMMAND",
                       help="command that starts each task, for example 'apptainer exec --nv lavit.sif'")  # fmt: skip
    slurm.add_argument("--container-python", default="python3", help="Python in the container (default: python3)")
    recovery = parser.add_argument_group("recovery")
    recovery.add_argument("--save-within", type=int, default=120, metavar="SECONDS",
                       help="the ranks save this long before the time limit (default: 120)")  # fmt: skip
    recovery.add_argument("--max-restarts", type=int, default=5,
                       help="restarts in a row without a new checkpoint before giving up (default: 5)")  # fmt: skip
    recovery.add_argument("--retry-wait", type=float, default=60.0, metavar="SECONDS",
                       help="wait before the second restart, then four times as long each (default: 60)")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="check everything and print the batch script")
    options = parser.parse_args(arguments)
    options.min_nodes = options.min_nodes or options.nodes
    found = re.fullmatch(r"(?:[\w.-]+:)?(\d+)", options.gpus_per_node)
    options.tasks_per_node = int(found[1]) if found else 0
    if min(options.nodes, options.tasks_per_node, options.min_nodes) < 1 or options.min_nodes > options.nodes:
        parser.error("--nodes, --min-nodes and --gpus-per-node are at least 1, and --min-nodes at most --nodes")
    return options


def launch(options: argparse.Namespace) -> int:
    """Check, print the plan, and submit.

    Raises:
        UserError, SlurmError: what is wrong, in one line.
    """
    plan = make_plan(options)
    _say("\n".join(plan.lines))
    executor = executor_for(options, plan.folder, plan.recipe.name)
    if ignored := ignored_variables(os.environ):
        _say(f"ignored       of the environment: {', '.join(ignored)}")
    if options.dry_run:
        _say(submitit_script(executor))
        return ExitCode.FINISHED
    new, asked = not plan.folder.own.exists(), plan.folder.stop_request()
    _prepare(plan, options)
    try:
        job = submit(executor, Job(plan.folder.run))
    except UnreachedError:
        raise
    except SlurmError:
        _undo(plan.folder, new=new, asked=asked)
        raise
    _say(f"job           {job.job_id}")
    _say(f"watch         python -m slurm.status {plan.folder.run}")
    _say(f"output        tail -F {job.paths.stdout}")
    _say(f"stop          python -m slurm.stop {plan.folder.run}")
    return ExitCode.FINISHED


def _prepare(plan: Plan, options: argparse.Namespace) -> None:
    freeze(plan)
    policy = Policy(options.max_restarts, options.retry_wait, options.save_within)
    environment = scheduler.without_secrets(scheduler.cleaned(os.environ))
    plan.folder.write_launch(
        Launch(options.tasks_per_node, options.min_nodes, plan.global_batch, plan.usable_nodes, policy, options.device,
               {name: value for name, value in environment.items() if name not in scheduler.KEPT})
    )  # fmt: skip
    plan.folder.withdraw_stop()


def _undo(folder: SlurmFolder, *, new: bool, asked: str) -> None:
    """Leave a run as it was before a launch that Slurm refused."""
    if asked:
        folder.request_stop(asked)
    if new:
        shutil.rmtree(folder.own)
        with contextlib.suppress(OSError):  # there was a run before
            folder.run.rmdir()


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


def main(arguments: list[str] | None = None) -> int:
    """Start a run on a cluster."""
    options = parse_arguments(arguments)
    try:
        return launch(options)
    except (UserError, SlurmError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return exit_code(error)


if __name__ == "__main__":
    sys.exit(main())
