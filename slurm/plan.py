"""What can be checked before a job is submitted, and what it will be."""

import argparse
import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.errors import without_secrets
from pretrain.check import check_recipe_here, resolve_for
from pretrain.engine.deepspeed_config import ResolvedDeepSpeed, read_deepspeed_config
from pretrain.engine.schedule import checkpoint_interval, count_steps
from pretrain.files import write_json
from pretrain.outcome import UserError
from pretrain.recipe import Recipe, load_recipe
from pretrain.run_folder import RunFolder
from slurm.folder import SlurmFolder
from slurm.history import History
from slurm.job_state import current_job
from slurm.scheduler import queue


@dataclass(frozen=True)
class Plan:
    """A run that may be submitted."""

    recipe: Recipe
    deepspeed: dict[str, Any]
    """Merged but not yet resolved: that is done on the nodes."""
    folder: SlurmFolder
    usable_nodes: tuple[int, ...]
    global_batch: int
    lines: tuple[str, ...]
    """The plan as text."""


def make_plan(options: argparse.Namespace) -> Plan:
    """Check everything that can be checked here; ``--device auto`` is GPUs.

    Args:
        options: of ``slurm.launch``.

    Raises:
        UserError: what is wrong, in one line.
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
    _refuse_a_second_job(folder)
    needed, free = _disk(run_size.checkpoint_bytes, recipe.checkpoint.keep + 1, run.path)
    steps = count_steps(recipe.schedule, epoch_size=run_size.train_samples, global_batch=batch.global_batch)
    interval = checkpoint_interval(recipe, steps)
    lines = [
        f"run           {run.path}" + (f", resumes from step {folder.saved_step()}" if folder.saved_step() else ""),
        f"model         {recipe.model.title}, {run_size.parameters:,} parameters, {run_size.classes} classes",
        f"data          {recipe.data.path}: {run_size.train_samples:,} train, {run_size.val_samples:,} val",
        f"ranks         {nodes} nodes x {per_node} = {nodes * per_node}"
        + (f"; a restart also takes {' or '.join(map(str, usable[:-1]))} nodes" if usable[:-1] else ""),
        f"batch         {batch.global_batch} = {batch.world_size} ranks x {batch.micro_batch} x {batch.accumulation}",
        f"length        {recipe.schedule.epochs:g} epochs, {steps:,} steps, a checkpoint every {interval:,}",
        f"disk          {needed / 1e9:.1f} GB for {recipe.checkpoint.keep + 1} checkpoints, {free / 1e9:.0f} GB free",
    ]
    return Plan(recipe, config, folder, tuple(usable), batch.global_batch, tuple(without_secrets(lines)))


def freeze(plan: Plan) -> None:
    """Write what was launched into the run's folder: a recipe that is edited tomorrow does not reach this run."""
    plan.folder.own.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(plan.recipe.model_dump(mode="json"), sort_keys=False)
    plan.folder.recipe.write_text(text)
    write_json(plan.folder.deepspeed_config, plan.deepspeed)


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    """Tasks may start elsewhere than the launch does."""
    content = recipe.model_dump()
    for section, key in (("data", "path"), ("loss", "class_tree"), ("probes", "path")):
        path = (content[section] or {}).get(key)
        if path is not None and "://" not in str(path):
            content[section][key] = str(Path(path).absolute())
    if recipe.initialize_from is not None and Path(recipe.initialize_from.handoff).exists():  # else the Hub's id of one
        content["initialize_from"]["handoff"] = str(Path(recipe.initialize_from.handoff).absolute())
    return Recipe.model_validate(content)


def _refuse_a_second_job(folder: SlurmFolder) -> None:
    job = current_job(folder, History(folder.history).records(), queue())
    if job is not None:
        raise UserError(
            f"{folder.run} is job {job.id} already ({job.state.lower()}): `python -m slurm.stop {folder.run}` ends "
            "it; or choose another name with --set name=..."
        )


def _disk(checkpoint_bytes: int, checkpoints: int, run: Path) -> tuple[int, int]:
    """Bytes that the checkpoints need and that there are; the one being written in addition to those that are kept."""
    there = next(path for path in (run, *run.parents) if path.exists())
    if not os.access(there, os.W_OK):
        raise UserError(f"{there} cannot be written: choose another folder with --runs")
    needed, free = checkpoint_bytes * checkpoints, shutil.disk_usage(there).free
    if needed > free:
        raise UserError(
            f"the checkpoints need {needed / 1e9:.1f} GB, but {there} has {free / 1e9:.1f} GB free: make space, lower "
            "checkpoint.keep, or choose another folder with --runs"
        )
    return needed, free
