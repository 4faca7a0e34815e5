"""From a checked recipe to a trainer that is ready for its first step."""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.dataset import Dataset
from data_pipeline.loader import EvalLoader, TrainLoader
from pretrain.checkpoints.checkpoint import load_newest
from pretrain.checkpoints.optimizer_shards import OptimizerShards
from pretrain.checkpoints.writer import CheckpointWriter, Retention
from pretrain.console import RunConsole
from pretrain.deepspeed_compat import count_parameters
from pretrain.engine.deepspeed_config import ResolvedDeepSpeed, input_dtype, resolve_for
from pretrain.engine.distributed import (
    Rank,
    first_of_node_checks,
    first_rank_decides,
    has_bf16,
    new_cpu_group,
    read_rank,
)
from pretrain.engine.engine import build_engine, build_model
from pretrain.engine.schedule import Schedule, draw_step
from pretrain.evaluation.probes import Probes, open_probe_sets
from pretrain.factory import architecture, is_lavit, try_network
from pretrain.fault_tolerance.nonfinite import NonFiniteSteps
from pretrain.fault_tolerance.signals import StopFlag
from pretrain.fault_tolerance.spikes import LossLevel
from pretrain.fault_tolerance.stop import StopAgreement
from pretrain.fault_tolerance.watchdog import REPORT_FIRST_S, Watchdog
from pretrain.handoff.initialize import Beginning, begin, share_weights
from pretrain.ledger import describe_setup
from pretrain.losses import Classification, TrainingLoss
from pretrain.metrics import MetricsWriter
from pretrain.monitoring.monitor import Monitor
from pretrain.monitoring.profile import StepProfiler
from pretrain.monitoring.sinks import check_trackers, open_trackers
from pretrain.recipe import Recipe
from pretrain.run_folder import RunFolder, checkpoint_facts
from pretrain.run_log import RunLog, RunStatus, StartUp
from pretrain.run_state import RunState
from pretrain.state import TrainState
from pretrain.trainer import Trainer


def build_trainer(
    recipe: Recipe,
    resolved: ResolvedDeepSpeed,
    folder: RunFolder,
    *,
    rank: Rank,
    device: torch.device,
    flag: StopFlag,
    control: dist.ProcessGroup,
    watchdog: Watchdog,
    status: RunStatus,
    startup: StartUp,
    profiled: tuple[int, int] | None = None,
    verbose: bool = False,
) -> Trainer:
    """Open the data, build network and engine, load the newest checkpoint, start the loaders. Collective.

    ``flag`` is set when the run shall stop, ``control`` a CPU group of all ranks for small objects; ``profiled`` are
    the first and the last step to profile here; ``verbose`` lets DeepSpeed print what it wants. This attempt owns
    ``status`` as soon as the folder is claimed.

    Raises:
        UserError: recipe, run folder or checkpoints do not fit together.
        DataError: the dataset is missing or damaged.
        StorageError: storage or network failed.
    """
    check_trackers(recipe.watch.sinks)
    watchdog.beat("opening the data", startup=True)
    train_set, val_set, probe_sets = _open_datasets(recipe, rank, control)
    fingerprints = {"train": train_set.fingerprint, "val": val_set.fingerprint}
    classification = Classification(recipe.loss, recipe.mixing, train_set.class_ids, device)
    startup.end("data")
    watchdog.beat("building the engine", startup=True)
    model = build_model(recipe, train_set.num_classes)
    macs = try_network(model, architecture(recipe, train_set.num_classes), device)

    def claim_folder() -> tuple[RunState, Beginning]:
        return folder.claim(
            recipe,
            resolved.config,
            {"dataset": _describe_dataset(train_set, classification)},
            fingerprints,
            rank=rank,
            begin=partial(begin, folder, model, recipe, train_set),
        )

    run_state, beginning = first_rank_decides(control, claim_folder)
    status.run_state, folder.locked = run_state, True
    share_weights(model, device)  # one rank has read a hand-off, and a factory may draw weights as it likes
    engine, engine_notes = build_engine(model, recipe, resolved, device, verbose=verbose)
    startup.end("engine")
    watchdog.beat("loading a checkpoint", startup=True)
    shards = OptimizerShards(engine, average=recipe.ema is not None)
    loaded = load_newest(folder.checkpoints, shards, group=control)
    state, warnings = loaded or (TrainState(), [])
    startup.end("checkpoint")
    nonfinite = NonFiniteSteps(engine, state.loss_scale)
    schedule = Schedule(recipe, len(train_set), resolved.batch.global_batch)
    batch = resolved.batch
    run_state.total_steps = total = schedule.total_steps
    console = RunConsole(rank.is_first, total, state.step, batch.global_batch)
    console.say("\n".join([*resolved.notes, *engine_notes, *beginning.notes, *(f"WARNING {one}" for one in warnings)]))
    console.say(
        f"{recipe.model.title}: {count_parameters(model):,} parameters; {recipe.data.path}: {len(train_set):,} train, "
        f"{len(val_set):,} val, {train_set.num_classes} classes; global batch {batch.global_batch} = "
        f"{batch.world_size} ranks x {batch.micro_batch} x {batch.accumulation}; ZeRO stage {resolved.stage}, "
        f"{resolved.precision}, {device.type}"
    )
    if loaded:
        state.reset_saves()
        console.say(f"resuming {folder.path} at step {state.step} of {total}, {state.samples_seen:,} images seen")
    place: dict[str, Any] = {
        "rank": rank.rank,
        "world_size": rank.world_size,
        "device": device,
        "local_ranks": rank.local_world_size,
        "on_bad_sample": partial(folder.append_bad_sample, rank=rank.rank),
    }
    base = folder.profile / f"rank-{rank.rank:05d}"
    profiler = profiled and StepProfiler(profiled, range(state.step, total), base, device, console.say)
    metrics = None
    if rank.is_first:
        trackers = open_trackers(recipe.watch.sinks, folder.path, recipe.model_dump(mode="json"), console.say)
        metrics = MetricsWriter(folder.path, state, trackers=trackers, say=console.say)
    setup, size = describe_setup(resolved, device, compiled=recipe.model.compile), len(train_set)
    log = RunLog(folder, status, console, metrics, state=state, epoch_size=size, setup=setup)
    log.start(warnings)
    dtype = input_dtype(resolved.precision)
    loss = TrainingLoss(recipe, engine, classification, device=device, dtype=dtype, epoch_size=size)
    monitor = Monitor(
        engine,
        shards,
        device=device,
        precision=resolved.precision,
        attention_images=recipe.watch.attention_images if is_lavit(model) else 0,
        data=recipe.data,
        class_names=train_set.class_names,
        show_batch=rank.is_first and not state.step,
        macs=macs,
    )
    writer = CheckpointWriter(
        folder.checkpoints,
        shards,
        retention=Retention(recipe.checkpoint.keep, recipe.checkpoint.keep_every_steps, recipe.checkpoint.keep_best),
        facts=checkpoint_facts(recipe, fingerprints, beginning.origin),
        group=new_cpu_group(60 * recipe.watchdog.start_minutes + REPORT_FIRST_S),
        say=console.say,
    )
    probes, size = None, recipe.evaluation.batch_size
    if recipe.probes is not None and probe_sets is not None:
        probes = Probes(recipe.probes, probe_sets, recipe.data, batch_size=size, control=control, place=place)
    trainer = Trainer(
        recipe=recipe,
        schedule=schedule,
        batch=batch,
        engine=engine,
        dtype=dtype,
        optimizer_shards=shards,
        loss=loss,
        nonfinite=nonfinite,
        train_loader=TrainLoader(
            train_set,
            recipe.data,
            seed=recipe.seed,
            global_batch=batch.global_batch,
            micro_batch=batch.micro_batch,
            start_sample=state.samples_seen,
            start_step=state.step,
            draw=partial(draw_step, recipe, model),
            **place,
        ),
        eval_loader=EvalLoader(val_set, recipe.data, batch_size=size, **place),
        probes=probes,
        writer=writer,
        monitor=monitor,
        loss_level=LossLevel(),
        log=log,
        stop=StopAgreement(flag, control),
        watchdog=watchdog,
        startup=startup,
        profiler=profiler,
        state=state,
    )
    startup.end("data")
    return trainer


def _open_datasets(
    recipe: Recipe, rank: Rank, control: dist.ProcessGroup
) -> tuple[Dataset, Dataset, tuple[Dataset, Dataset] | None]:
    """Training split, validation split, and both of the probes' set. Collective."""
    data, probes = recipe.data, recipe.probes

    def open_all(check_files: bool) -> tuple[Dataset, Dataset, tuple[Dataset, Dataset] | None]:
        return (
            Dataset.open(data.path, data.train_split, data.cache, check_files=check_files),
            Dataset.open(data.path, data.val_split, data.cache, check_files=check_files),
            None if probes is None else open_probe_sets(probes, check_files=check_files),
        )

    return first_of_node_checks(rank, control, open_all)


def _describe_dataset(train_set: Dataset, classification: Classification) -> dict[str, Any]:
    """What ``environment.json`` records of the training split."""
    return {
        "name": train_set.name,
        "fingerprint": train_set.fingerprint,
        "samples": len(train_set),
        "class_names": list(train_set.class_names),
        "class_ids": list(train_set.class_ids),
        "class_levels": None if classification.levels is None else classification.levels.tolist(),
    }


def open_trainer(
    recipe: Recipe,
    deepspeed: dict[str, Any],
    folder: RunFolder,
    *,
    device: torch.device,
    control: dist.ProcessGroup,
    flag: StopFlag | None = None,
) -> Trainer:
    """``build_trainer`` as ``pretrain.main`` calls it; ``deepspeed`` is DeepSpeed's configuration as it was merged."""
    rank, gpu, limits = read_rank(), device.type == "cuda", recipe.watchdog
    return build_trainer(
        recipe,
        resolve_for(recipe, deepspeed, world_size=rank.world_size, has_gpu=gpu, has_bf16_gpu=has_bf16(device)),
        folder,
        rank=rank,
        device=device,
        flag=StopFlag() if flag is None else flag,  # one that is not set is false
        control=control,
        watchdog=Watchdog(folder.hangs, rank.rank, start_s=60 * limits.start_minutes, step_s=60 * limits.step_minutes),
        status=RunStatus(folder, first=rank.is_first),
        startup=StartUp("imports"),
    )
