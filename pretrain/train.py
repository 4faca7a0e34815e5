"""The training loop."""

import time
from collections.abc import Iterator

import torch

from data_pipeline.batch import Batch, to_device
from data_pipeline.mixing import mix
from pretrain.engine.optimizers import peak_learning_rate
from pretrain.engine.schedule import StepDraw, draw_step, learning_rate
from pretrain.fault_tolerance.bad_steps import RUN_AHEAD
from pretrain.fault_tolerance.spikes import write_spikes
from pretrain.losses import diagonality_weight
from pretrain.outcome import ExitCode
from pretrain.run import Run


def train(run: Run) -> ExitCode:
    """Train until all steps are taken or a stop is agreed on; either way the state is on disk afterwards.

    What is due at a boundary is derived from ``run.progress``, so that a run resumed at a boundary does there what
    its former incarnation had not come to.
    """
    progress, batches = run.progress, iter(run.train_loader)
    while True:
        run.profile()
        if run.evaluation_due():
            run.evaluate()
        if run.probes_due():
            run.probe()
        if run.checkpoint_due():
            run.save()
        if run.done or run.stop.at_step_boundary():
            break
        began = time.monotonic()
        lr = train_step(run, batches)
        progress.step += 1
        if run.first_step:
            run.first_step_done()
        progress.samples_seen += run.batch.global_batch
        progress.train_seconds += time.monotonic() - began
        run.console.step_done(progress.step)
        run.note_steps(but=RUN_AHEAD)
        if run.log_due():
            run.log(lr)
            tell_spikes(run)
    if run.done and not run.evaluation_due() and not run.probes_due():
        run.finish()
        return ExitCode.FINISHED
    run.settle_save()
    if run.saved_at != progress.samples_seen and progress.samples_seen:
        run.save(wait=True)
    reason = run.stop.reason()
    saved = run.saved_at == progress.samples_seen
    kept = "saved; the same command goes on from here" if saved else "nothing new was saved"
    run.console.say(f"stopped at step {progress.step} of {run.total_steps} ({reason}), {kept}")
    run.logbook.write_state("preempted", reason)
    return ExitCode.STOPPED


def train_step(run: Run, batches: Iterator[Batch]) -> float:
    """One optimizer step over the global batch, in as many micro-batches as fit; the result is its learning rate.

    A step whose gradients are not finite changes nothing, on all ranks alike; ``run.bad_steps`` knows of it. The host
    waits for nothing here but the data.
    """
    recipe, progress, enter = run.recipe, run.progress, run.meter.timer.enter
    lr = learning_rate(
        progress.samples_seen + run.batch.global_batch,
        peak=peak_learning_rate(recipe.optimizer, run.batch.global_batch)[0],
        schedule=recipe.schedule,
        epoch_size=run.epoch_size,
    )
    for group in run.engine.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    for _ in range(run.batch.accumulation):
        enter("data")
        run.watchdog.beat("waiting for data", patient=run.first_step)
        batch = next(batches)
        run.watchdog.beat("computing, or waiting for the other ranks", patient=run.first_step)
        run.monitor.see(batch)
        enter("forward")
        loss, parts = micro_batch_loss(run, batch)
        enter("backward")
        run.engine.backward(loss)
        enter("optimizer")
        run.engine.step()  # DeepSpeed steps the optimizer with the last micro-batch only
        run.meter.add({"loss": loss, **parts})
    run.bad_steps.note_step()
    if recipe.ema is not None:
        run.optimizer_shards.update_average(min(recipe.ema.decay, (1 + progress.step) / (10 + progress.step)))
    enter("other")
    run.meter.steps += 1
    return lr


def tell_spikes(run: Run) -> None:
    """Write down which steps of the interval just logged had a loss far above the level, and on which images."""
    spikes = run.meter.level.spikes(
        run.meter.step_losses,
        step=run.progress.step,
        samples_seen=run.progress.samples_seen,
        global_batch=run.batch.global_batch,
    )
    if run.metrics:
        write_spikes(run.folder.loss_spikes, spikes, run.train_loader.samples, run.console.say)


def micro_batch_loss(run: Run, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Forward pass and loss of one micro-batch: of classification plus the weighted diagonality loss.

    Returns:
        the scalar to minimise, and its unweighted parts.
    """
    recipe, model = run.recipe, run.engine.module
    drawn: StepDraw = batch.drawn or draw_step(recipe, model, run.progress.step, batch.rows)
    uniforms = None if drawn.drop_path is None else to_device(drawn.drop_path, run.device)
    images, targets = mix(
        batch.images,
        batch.labels,
        batch.rows,
        config=run.classification.mixing,
        num_classes=model.config.num_classes,
        seed=recipe.seed,
        step=run.progress.step,
        drawn=drawn.mixing,
    )
    logits, diagonality = run.engine(images.to(run.dtype), drop_path_uniforms=uniforms, with_diagonality=True)
    classification = run.classification(logits, targets)
    weight = diagonality_weight(recipe.loss, epoch=run.progress.samples_seen / run.epoch_size)
    loss = classification + weight * diagonality.float()
    return loss, {run.classification.name: classification, "diagonality": diagonality}
