"""Start a run on a Slurm cluster, one task per GPU.

After preemption, time limits, lost nodes, crashes and hangs it is restarted and resumes from its newest checkpoint,
until it is finished, stopped with `python -m slurm.stop`, or cannot succeed. `python -m slurm.status` shows its state.
"""

import argparse
import contextlib
import io
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from data_pipeline.errors import without_secrets
from pretrain.arguments import add_device_argument, add_run_arguments
from pretrain.check import check_recipe_here
from pretrain.engine.deepspeed_config import ResolvedDeepSpeed, read_deepspeed_config, resolve_for
from pretrain.engine.schedule import Schedule
from pretrain.files import write_json
from pretrain.outcome import ExitCode, UserError
from pretrain.recipe import Recipe, load_recipe
from pretrain.run_folder import RunFolder
from slurm import scheduler
from slurm.attempt import ROOT
from slurm.folder import Launch, SlurmFolder
from slurm.job import Job
from slurm.job_state import job_of
from slurm.restart import Policy
from slurm.scheduler import SlurmError, UnreachedError

if TYPE_CHECKING:
    import submitit

SITE = ("account", "partition", "qos", "constraint", "reservation", "wckey")
"""Options that sbatch also takes from the environment, as SBATCH_ACCOUNT, and that a site or a user may set there."""
OWN = ("array", "error", "no_requeue", "nodes", "ntasks", "ntasks_per_node", "open_mode", "output", "requeue", "signal",
       "wrap")  # fmt: skip
"""Options without which a run does not recover."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m slurm.launch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    run = parser.add_argument_group("the run (as for pretrain/main.py)")
    add_run_arguments(run, runs="folder that holds the run folders, visible to all nodes")
    add_device_argument(run)
    size = parser.add_argument_group("size")
    size.add_argument("--nodes", type=int, default=1, help="default: 1")
    size.add_argument("--min-nodes", type=int, help="fewest nodes to restart with; the global batch stays the same")
    size.add_argument("--gpus-per-node", required=True, metavar="[TYPE:]N", help="one task each; such as 8 or h100:8")
    slurm = parser.add_argument_group("Slurm")
    for name in ("partition", "account", "qos", "constraint", "exclude", "mem"):
        slurm.add_argument(f"--{name}", help=f"as sbatch --{name}")
    slurm.add_argument("--time", default="24:00:00", help="limit of one attempt (default: 24:00:00)")
    slurm.add_argument("--cpus-per-gpu", type=int, default=8, help="cores for each task (default: 8)")
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


def make_plan(options: argparse.Namespace) -> tuple[SlurmFolder, Recipe, dict[str, Any], Launch]:
    """Check everything that can be checked here, and print the plan; ``--device auto`` is GPUs.

    Returns folder, recipe, DeepSpeed's configuration (merged, and resolved only on the nodes) and ``launch.json``.
    Raises a UserError where something is wrong.
    """
    recipe = _with_absolute_paths(load_recipe(options.recipe, options.assignments))
    run = RunFolder(options.runs.resolve() / recipe.name)
    config = read_deepspeed_config(options.deepspeed_config, recipe.deepspeed, recorded_stage=run.recorded_stage())
    run.check_recipe(recipe, config)
    run_size = check_recipe_here(recipe, run)
    nodes, per_node, on_gpus = options.nodes, options.tasks_per_node, options.device != "cpu"

    def resolve(ranks: int) -> ResolvedDeepSpeed:
        return resolve_for(recipe, config, world_size=ranks, has_gpu=on_gpus, has_bf16_gpu=on_gpus)

    batch = resolve(nodes * per_node).batch
    usable = []
    for fewer in range(options.min_nodes, nodes + 1):
        with contextlib.suppress(UserError):
            resolve(fewer * per_node)
            usable.append(fewer)
    state = run.read_state()
    if state is not None and state.state == "finished":
        raise UserError(f"{run.path} is finished; to train again choose --set name=..., or remove the folder")
    folder = SlurmFolder(run.path)
    job = job_of(folder, folder.attempts(), scheduler.queue())
    if job is not None and not job.over:
        raise UserError(
            f"{folder.run} is job {job.id} already ({job.state.lower()}): `python -m slurm.stop {folder.run}` ends "
            "it; or choose another name with --set name=..."
        )
    schedule = Schedule(recipe, run_size.train_samples, batch.global_batch)
    steps, interval = schedule.total_steps, schedule.checkpoint_every
    lines = [
        f"run           {run.path}" + (f", resumes from step {folder.saved_step()}" if folder.saved_step() else ""),
        f"model         {recipe.model.title}, {run_size.parameters:,} parameters, {run_size.classes} classes",
        f"data          {recipe.data.path}: {run_size.train_samples:,} train, {run_size.val_samples:,} val",
        f"ranks         {nodes} nodes x {per_node} = {nodes * per_node}"
        + (f"; a restart also takes {' or '.join(map(str, usable[:-1]))} nodes" if usable[:-1] else ""),
        f"batch         {batch.global_batch} = {batch.world_size} ranks x {batch.micro_batch} x {batch.accumulation}",
        f"length        {recipe.schedule.epochs:g} epochs, {steps:,} steps, a checkpoint every {interval:,}",
        f"disk          {_disk(run_size.checkpoint_bytes, recipe.checkpoint.keep + 1, run.path)}",
    ]
    _say(*without_secrets(lines))
    policy = Policy(options.max_restarts, options.retry_wait, options.save_within)
    environment = scheduler.reusable(os.environ)
    launch = Launch(per_node, options.min_nodes, batch.global_batch, usable, policy, options.device, environment)
    return folder, recipe, config, launch


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    """Tasks may start elsewhere than the launch does."""
    content = recipe.model_dump()
    for section, key in (
        ("data", "path"), ("loss", "class_tree"), ("probes", "path"), ("initialize_from", "handoff"),
    ):  # fmt: skip
        path = (content[section] or {}).get(key)
        on_the_hub = section == "initialize_from" and not Path(path or ".").exists()
        if path is not None and not on_the_hub and "://" not in str(path):
            content[section][key] = str(Path(path).absolute())
    return Recipe.model_validate(content)


def _disk(checkpoint_bytes: int, checkpoints: int, run: Path) -> str:
    """What the checkpoints need, the one being written in addition to those that are kept, and what there is."""
    there = next(path for path in (run, *run.parents) if path.exists())
    if not os.access(there, os.W_OK):
        raise UserError(f"{there} cannot be written: choose another folder with --runs")
    needed, free = checkpoint_bytes * checkpoints, shutil.disk_usage(there).free
    if needed > free:
        raise UserError(
            f"the checkpoints need {needed / 1e9:.1f} GB, but {there} has {free / 1e9:.1f} GB free: make space, lower "
            "checkpoint.keep, or choose another folder with --runs"
        )
    return f"{needed / 1e9:.1f} GB for {checkpoints} checkpoints, {free / 1e9:.0f} GB free"


def sbatch_options(options: argparse.Namespace) -> dict[str, Any]:
    """What sbatch is asked for, by the names of its options with underscores; True for one without a value.

    The environment's SBATCH_ACCOUNT and the like apply where the options do not set it. Raises a UserError where an
    option cannot be given, or has a line break.
    """
    asked = {name: os.environ.get(f"SBATCH_{name.upper()}") for name in SITE} | {
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


def executor_for(options: argparse.Namespace, folder: SlurmFolder, name: str) -> "submitit.SlurmExecutor":
    """Make submitit's executor for a run, whose job is called ``name``; a UserError where Slurm is not installed."""
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
        additional_parameters=sbatch_options(options),
    )
    return executor


def submit(executor: "submitit.SlurmExecutor", job: Job) -> "submitit.Job[None]":
    """Submit a run's first job, without the environment's variables for sbatch and srun; a SlurmError if that fails."""
    from submitit.core.utils import FailedJobError  # noqa: PLC0415
    from submitit.helpers import clean_env  # noqa: PLC0415

    kept = {name: os.environ[name] for name in scheduler.KEPT if name in os.environ}
    try:
        with clean_env(), contextlib.redirect_stderr(io.StringIO()):  # where submitit prints what it raises
            os.environ.update(kept)
            return executor.submit(job)
    except FailedJobError as error:
        raise scheduler.failure("sbatch", str(error)) from None


def launch(options: argparse.Namespace) -> None:
    """Check, print the plan, and submit; raises a UserError where something is wrong."""
    folder, recipe, deepspeed, launched = make_plan(options)
    executor = executor_for(options, folder, recipe.name)
    used = {f"SBATCH_{name.upper()}" for name in SITE} | {*scheduler.KEPT}
    ignored = [n for n in sorted(os.environ) if n.startswith(("SLURM_", "SBATCH_", "SRUN_")) and n not in used]
    if ignored:
        _say(f"ignored       of the environment: {', '.join(ignored)}")
    if options.dry_run:
        command = executor._submitit_command_str  # noqa: SLF001 - submitit has no public way to see its script
        _say(executor._make_submission_file_text(command, "dry-run"))  # noqa: SLF001
        return
    new, stop_request = not folder.own.exists(), folder.stop_request()
    freeze(folder, recipe, deepspeed, launched)
    folder.stop.unlink(missing_ok=True)
    try:
        job = submit(executor, Job(folder.run))
    except UnreachedError as error:
        advice = "the job may exist: check `squeue --me`, cancel it, then launch again"
        raise UnreachedError(f"{error}; {advice}") from None
    except SlurmError:  # leave the run as it was
        if stop_request:
            folder.request_stop(stop_request)
        if new:
            shutil.rmtree(folder.own)
            with contextlib.suppress(OSError):  # there was a run before
                folder.run.rmdir()
        raise
    _say(
        f"job           {job.job_id}",
        f"watch         python -m slurm.status {folder.run}",
        f"output        tail -F {job.paths.stdout}",
        f"stop          python -m slurm.stop {folder.run}",
    )


def freeze(folder: SlurmFolder, recipe: Recipe, deepspeed: dict[str, Any], launched: Launch) -> None:
    """Write what was launched into the run's folder: a recipe that is edited tomorrow does not reach this run."""
    folder.write_launch(launched)
    folder.recipe.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    write_json(folder.deepspeed_config, deepspeed)


def _say(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)  # noqa: T201


def main(arguments: list[str] | None = None) -> int:
    """Start a run on a cluster."""
    options = parse_arguments(arguments)
    try:
        launch(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return error.code
    return ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(main())
