"""Everything between a checked recipe and the first step."""

import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from data_pipeline.dataset import Dataset
from data_pipeline.errors import DataError
from data_pipeline.loader import BadSample, EvalLoader, TrainLoader
from pretrain.checkpoints.checkpoint import (
    CheckpointDamagedError,
    list_checkpoints,
    load_newest,
    read_manifest,
)
from pretrain.checkpoints.optimizer_shards import OptimizerShards
from pretrain.checkpoints.writer import CheckpointWriter, Retention
from pretrain.console import RunConsole
from pretrain.engine.deepspeed_config import ResolvedDeepSpeed
from pretrain.engine.distributed import Rank, new_cpu_group
from pretrain.engine.engine import build_engine, build_model
from pretrain.engine.precision import input_dtype
from pretrain.engine.schedule import count_steps, draw_step
from pretrain.evaluation.probes import Probes, open_probe_sets
from pretrain.events import write_event, write_start
from pretrain.fault_tolerance.bad_steps import BadSteps
from pretrain.fault_tolerance.signals import StopFlag
from pretrain.fault_tolerance.stop import StopAgreement
from pretrain.fault_tolerance.watchdog import SPEAKS_FIRST_S, Watchdog
from pretrain.files import lock
from pretrain.handoff.initialize import Beginning, begin, share_weights
from pretrain.losses import Classification
from pretrain.metrics import MetricsWriter
from pretrain.monitoring.monitor import Monitor
from pretrain.monitoring.sinks import check_trackers, open_trackers
from pretrain.outcome import BusyError, UserError, storage_code
from pretrain.recipe import Recipe
from pretrain.run import Run
from pretrain.run_folder import RunFolder, checkpoint_facts
from pretrain.run_state import RunState
from pretrain.state import TrainState

T = TypeVar("T")
LOCK_WAIT_S = 90.0
"""How long a start waits for a former incarnation that is still saving."""


def assemble(
    recipe: Recipe,
    resolved: ResolvedDeepSpeed,
    folder: RunFolder,
    *,
    rank: Rank,
    device: torch.device,
    flag: StopFlag,
    control: dist.ProcessGroup,
    watchdog: Watchdog,
    verbose: bool = False,
) -> Run:
    """Open the data, build model and engine, load the newest checkpoint, start the loaders. Collective.

    ``verbose`` lets DeepSpeed print what it wants.

    Raises:
        UserError: recipe, run folder or checkpoints do not fit together.
        DataError: the dataset is missing or damaged.
        StorageError: storage or network failed.
    """

    def open_sets(check_files: bool) -> tuple[Dataset, Dataset, tuple[Dataset, Dataset] | None]:
        data, probes = recipe.data, recipe.probes
        return (
            Dataset.open(data.path, data.train_split, data.cache, check_files=check_files),
            Dataset.open(data.path, data.val_split, data.cache, check_files=check_files),
            None if probes is None else open_probe_sets(probes, check_files=check_files),
        )

    train_set, val_set, probe_sets = first_of_node_checks(rank, control, open_sets)
    fingerprints = {"train": train_set.fingerprint, "val": val_set.fingerprint}
    classification = Classification(recipe.loss, recipe.mixing, train_set.class_ids, device)
    facts = {
        "dataset": {
            "name": train_set.name,
            "fingerprint": train_set.fingerprint,
            "samples": len(train_set),
            "class_names": list(train_set.class_names),
            "class_ids": list(train_set.class_ids),
            "class_levels": None if classification.levels is None else classification.levels.tolist(),
        }
    }
    model = build_model(recipe, train_set.num_classes)

    def first_weights() -> Beginning:
        return begin(folder, model, recipe, train_set)

    def open_folder() -> tuple[RunState, Beginning]:
        return _open_folder(folder, recipe, resolved, facts, fingerprints, rank=rank, begin=first_weights)

    state, beginning = first_rank_decides(control, open_folder)
    folder.locked, watchdog.on_hang = True, folder.note_failure
    if beginning.initialized:
        share_weights(model, device)

    engine, engine_notes = build_engine(model, recipe, resolved, device, verbose=verbose)
    shards = OptimizerShards(engine, average=recipe.ema is not None)
    loaded = load_newest(folder.checkpoints, shards, group=control)
    progress, warnings = loaded or (TrainState(), [])
    bad_steps = BadSteps(engine)
    bad_steps.set_loss_scale(progress.loss_scale)
    epoch_size, batch = len(train_set), resolved.batch
    total_steps = count_steps(recipe.schedule, epoch_size=epoch_size, global_batch=batch.global_batch)
    console = RunConsole(
        speaks=rank.is_first, total_steps=total_steps, first_step=progress.step, global_batch=batch.global_batch
    )
    for note in (*resolved.notes, *engine_notes, *beginning.notes):
        console.say(note)
    for warning in warnings:
        console.say(f"WARNING {warning}")
    parameters = sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in model.parameters())
    console.say(
        f"{recipe.model.name}: {parameters:,} parameters; {recipe.data.path}: {epoch_size:,} train, "
        f"{len(val_set):,} val, {train_set.num_classes} classes; global batch {batch.global_batch} = "
        f"{batch.world_size} ranks x {batch.micro_batch} x {batch.accumulation}; ZeRO stage {resolved.stage}, "
        f"{resolved.precision}, {device.type}"
    )
    if loaded:
        console.say(
            f"resuming {folder.path} at step {progress.step} of {total_steps}, {progress.samples_seen:,} images seen"
        )
    where = _where(folder, rank, device)
    train_loader = TrainLoader(
        train_set,
        recipe.data,
        seed=recipe.seed,
        global_batch=batch.global_batch,
        micro_batch=batch.micro_batch,
        start_sample=progress.samples_seen,
        start_step=progress.step,
        draw=partial(draw_step, recipe, model),
        **where,
    )
    eval_loader = EvalLoader(val_set, recipe.data, batch_size=recipe.evaluation.batch_size, **where)
    probes = None
    if recipe.probes is not None and probe_sets is not None:
        size = recipe.evaluation.batch_size
        probes = Probes(recipe.probes, probe_sets, recipe.data, batch_size=size, control=control, where=where)
    metrics = None
    if rank.is_first:
        state.total_steps, state.step, state.samples_seen = total_steps, progress.step, progress.samples_seen
        metrics = _open_metrics(recipe, folder, progress, console)
        _write_start(folder, state, warnings)
    monitor = Monitor(
        engine,
        shards,
        device=device,
        precision=resolved.precision,
        attention_pictures=recipe.watch.attention_pictures,
        data=recipe.data,
        class_names=train_set.class_names,
        request=folder.show,
        fresh=not progress.step,
    )
    return Run(
        recipe=recipe,
        batch=batch,
        epoch_size=epoch_size,
        total_steps=total_steps,
        device=device,
        engine=engine,
        dtype=input_dtype(resolved.precision),
        optimizer_shards=shards,
        bad_steps=bad_steps,
        writer=CheckpointWriter(
            folder.checkpoints,
            shards,
            retention=Retention(
                recipe.checkpoint.keep, recipe.checkpoint.keep_every_steps, recipe.checkpoint.keep_best
            ),
            facts=checkpoint_facts(recipe, fingerprints, beginning.origin),
            group=new_cpu_group(60 * recipe.watchdog.start_minutes + SPEAKS_FIRST_S),
            say=console.say,
        ),
        classification=classification,
        train_loader=train_loader,
        eval_loader=eval_loader,
        probes=probes,
        folder=folder,
        state=state,
        metrics=metrics,
        console=console,
        stop=StopAgreement(flag, control),
        control=control,
        progress=progress,
        watchdog=watchdog,
        monitor=monitor,
        saved_at=progress.samples_seen if loaded else -1,
    )


def first_rank_decides(group: dist.ProcessGroup, decide: Callable[[], T]) -> T:
    """Run ``decide`` on rank 0 and give its result, or its ``UserError``, to every rank. Collective."""
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = decide()
        except UserError as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0, group=group)
    if answer[1] is not None:
        raise answer[1]
    result: T = answer[0]
    return result


def first_of_node_checks(rank: Rank, group: dist.ProcessGroup, open_sets: Callable[[bool], T]) -> T:
    """Open datasets, with a check of their files by the first rank of each node only. Collective.

    Args:
        rank: this rank.
        group: CPU group of all ranks.
        open_sets: opens them; its argument is ``check_files`` of ``Dataset.open``.

    Raises:
        DataError: on all ranks alike where a node's first rank refuses them.
    """
    opened: list[T] = []
    problem: DataError | None = None
    if rank.local_rank == 0:
        try:
            opened.append(open_sets(True))
        except DataError as error:
            problem = error
    problems: list[Any] = [None] * rank.world_size
    dist.all_gather_object(problems, problem, group=group)
    for problem in filter(None, problems):
        raise problem
    return opened[0] if opened else open_sets(False)


def _open_folder(
    folder: RunFolder,
    recipe: Recipe,
    resolved: ResolvedDeepSpeed,
    facts: dict[str, Any],
    fingerprints: dict[str, str],
    *,
    rank: Rank,
    begin: Callable[[], Beginning],
) -> tuple[RunState, Beginning]:
    """Check that the folder holds this run or none, take its lock, begin, and describe what runs now."""
    check_trackers(recipe.watch.sinks)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        _lock(folder.path / ".lock")
        folder.check_recipe(recipe, resolved.config)
        former = folder.read_state()
        _check_content(folder, recipe, fingerprints, former)
        if former is not None and former.state == "finished":
            raise UserError(f"{folder.path} was finished by another process meanwhile; there is nothing left to do")
        beginning = begin()
        folder.write_description(recipe, resolved.config, facts | {"initialized_from": beginning.origin})
    except OSError as error:
        raise UserError(f"{folder.path} cannot be written: {error}", storage_code(error)) from None
    state = RunState(
        state="running",
        restarts=former.restarts + 1 if former else 0,
        world_size=rank.world_size,
        job_id=rank.job_id,
        host=rank.host,
        fingerprints=fingerprints,
    )
    return state, beginning


def _check_content(folder: RunFolder, recipe: Recipe, here: dict[str, str], former: RunState | None) -> None:
    """Refuse splits whose content is not that of ``environment.json``, ``run.json`` and the newest checkpoint."""
    recorded = [] if former is None else [former.fingerprints]
    if folder.read_recipe() is not None and (folder.path / "environment.json").exists():
        recorded.append({"train": folder.read_dataset()["fingerprint"]})
    for path in list_checkpoints(folder.checkpoints)[:1]:
        with suppress(CheckpointDamagedError):  # it is passed over later
            manifest = read_manifest(path)
            folder.check_checkpoint(path, manifest, recipe)
            recorded.append(manifest.get("fingerprints", {}))
    for split, fingerprint in here.items():
        if any(old.get(split, fingerprint) != fingerprint for old in recorded):
            raise UserError(
                f"{recipe.data.path} holds other images or labels for '{split}' than when {folder.path} was started: "
                "give the run another name with --set name=..., or put the old dataset back"
            )


def _where(folder: RunFolder, rank: Rank, device: torch.device) -> dict[str, Any]:
    """What every loader is told: its place among the ranks, and whom to tell of a damaged sample."""

    def tell_bad_sample(bad: BadSample) -> None:
        try:
            folder.append_bad_sample({**asdict(bad), "rank": rank.rank, "time": time.time()})
        except OSError as error:
            print(f"WARNING bad sample {bad.name} could not be listed: {error}", file=sys.stderr)  # noqa: T201

    return {
        "rank": rank.rank,
        "world_size": rank.world_size,
        "device": device,
        "local_ranks": rank.local_world_size,
        "on_bad_sample": tell_bad_sample,
    }


def _open_metrics(recipe: Recipe, folder: RunFolder, progress: TrainState, console: RunConsole) -> MetricsWriter:
    """Go on writing metrics behind what the checkpoint knows of."""
    return MetricsWriter(
        folder.metrics,
        folder.tensorboard,
        samples_seen=progress.samples_seen,
        done={
            "eval": progress.evaluated_at,
            "eval_average": progress.evaluated_at,
            "attention": progress.evaluated_at,
            "probe": progress.probed_at,
        },
        trackers=open_trackers(recipe.watch.sinks, folder.path, recipe.model_dump(mode="json"), console.say),
        say=console.say,
    )


def _write_start(folder: RunFolder, state: RunState, warnings: Iterable[str]) -> None:
    """Write what runs now, from where, and which checkpoints were passed over."""
    write_start(folder.events, state, folder.read_state())
    for warning in warnings:
        at = {"step": state.step, "samples_seen": state.samples_seen}
        write_event(folder.events, "checkpoint passed over", text=warning, **at)
    folder.write_state(state)


_locks: list[Any] = []  # held open for the life of the process


def _lock(path: Path) -> None:
    deadline = time.monotonic() + LOCK_WAIT_S
    while (handle := lock(path)) is None:
        if time.monotonic() > deadline:
            raise BusyError(
                f"another process is training {path.parent}: stop it first, or choose another name with --set name=..."
            )
        time.sleep(0.2)
    _locks.append(handle)
