"""The training loop, one step, and what is due between steps."""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.batch import Batch
from data_pipeline.loader import EvalLoader, TrainLoader
from pretrain.checkpoints.checkpoint import load_newest
from pretrain.checkpoints.optimizer_shards import OptimizerShards
from pretrain.checkpoints.writer import CheckpointWriter
from pretrain.engine.deepspeed_config import BatchPlan
from pretrain.engine.distributed import limit_collectives
from pretrain.engine.schedule import Schedule
from pretrain.evaluation.accuracy import Evaluation, evaluate
from pretrain.evaluation.probes import Probes, ProbesEndedError
from pretrain.export import export_run
from pretrain.fault_tolerance.nonfinite import RUN_AHEAD, NonFiniteSteps
from pretrain.fault_tolerance.spikes import LossLevel
from pretrain.fault_tolerance.stop import StopAgreement
from pretrain.fault_tolerance.watchdog import REPORT_FIRST_S, Watchdog
from pretrain.losses import TrainingLoss
from pretrain.monitoring.monitor import Monitor
from pretrain.monitoring.profile import StepProfiler
from pretrain.outcome import ExitCode, UserError
from pretrain.recipe import Recipe
from pretrain.run_folder import write_summary
from pretrain.run_log import RunLog, StartUp
from pretrain.state import TrainState


@dataclass
class Trainer:
    """Trains on this rank; ``build_trainer`` builds its parts."""

    recipe: Recipe
    schedule: Schedule
    batch: BatchPlan
    engine: Any
    """``deepspeed.DeepSpeedEngine`` of a LaViT."""
    dtype: torch.dtype
    """In which the network takes its images."""
    optimizer_shards: OptimizerShards
    loss: TrainingLoss
    nonfinite: NonFiniteSteps
    train_loader: TrainLoader
    eval_loader: EvalLoader
    probes: Probes | None
    writer: CheckpointWriter
    monitor: Monitor
    loss_level: LossLevel
    log: RunLog
    stop: StopAgreement
    watchdog: Watchdog
    startup: StartUp
    profiler: StepProfiler | None
    state: TrainState

    def train(self) -> ExitCode:
        """Train until all steps are taken or a stop is agreed on; either way the state is on disk afterwards.

        What is due is derived from ``state``: a run resumed at a boundary does there what was not reached before.
        """
        batches, self._clock = iter(self.train_loader), time.monotonic()
        while True:
            if self.evaluation_due():
                self.evaluate()
            if self.probes_due():
                self.probe()
            if self.checkpoint_due():
                self.handle_skipped_steps()
                if self.done or not self.state.skipped_in_a_row:
                    self.save()
            if self.done or self.stop.at_step_boundary():
                break
            if self.profiler is not None:
                self.profiler.before_step(self.state.step)
            learning_rate = self.train_step(batches, measure_norms=self.log_due(ahead=1))
            self.state.step += 1
            self.state.samples_seen += self.batch.global_batch
            if self.profiler is not None:
                self.profiler.after_step(self.state.step)
            if self.watchdog.starting:
                self._end_startup()
            self.log.console.step_done(self.state.step)
            self.handle_skipped_steps(skip_last=RUN_AHEAD)
            if self.log_due():
                self.log_interval(learning_rate)
        if self.done and not self.evaluation_due() and not self.probes_due():
            self._finish()
            return ExitCode.FINISHED
        return self._stop()

    def train_step(self, batches: Iterator[Batch], *, measure_norms: bool = False) -> float:
        """One optimizer step over the global batch, in micro-batches.

        A step with non-finite gradients changes nothing, on all ranks alike. The host waits for nothing but the data.

        Returns:
            its learning rate.
        """
        monitor, watchdog, engine = self.monitor, self.watchdog, self.engine
        learning_rate = self.schedule.learning_rate(self.state.samples_seen)
        monitor.norms.wanted = measure_norms
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        for _ in range(self.batch.accumulation):
            monitor.timer.enter("data")
            watchdog.beat("waiting for data")
            batch = next(batches)
            watchdog.beat("computing, or waiting for the other ranks")
            monitor.see_batch(batch)
            monitor.timer.enter("forward")
            loss, parts = self.loss(batch, self.state)
            monitor.timer.enter("backward")
            engine.backward(loss)
            monitor.timer.enter("optimizer")
            engine.step()  # DeepSpeed steps the optimizer with the last micro-batch only
            monitor.add({"loss": loss, **parts})
        skipped = self.nonfinite.note_step()
        self.optimizer_shards.buffers.step_done(skipped=skipped)
        if self.recipe.ema is not None:
            step = self.state.step
            self.optimizer_shards.update_average(min(self.recipe.ema.decay, (1 + step) / (10 + step)))
        monitor.end_step(skipped)
        return learning_rate

    @property
    def done(self) -> bool:
        """Whether all steps are taken."""
        return self.state.step >= self.schedule.total_steps

    def evaluation_due(self) -> bool:
        """Whether an evaluation boundary, or the end, was passed and not yet evaluated."""
        return self.schedule.passed(self.recipe.evaluation.every_epochs, self.state.evaluated_at, self.state)

    def probes_due(self) -> bool:
        """The same for the probes, where the recipe has any."""
        section = self.recipe.probes
        return section is not None and self.schedule.passed(section.every_epochs, self.state.probed_at, self.state)

    def checkpoint_due(self) -> bool:
        """Whether a checkpoint of this step is due and not yet begun."""
        state, section = self.state, self.recipe.checkpoint
        newest = max(state.saved_at, state.save_tried_at, 0)
        due = state.samples_seen - newest >= self.schedule.checkpoint_every * self.batch.global_batch
        best = section.keep_best and state.best_at == state.samples_seen
        # A stop saves before an evaluation that it interrupted: the same step is saved again with its result.
        evaluated = state.evaluated_at == state.samples_seen > state.evaluation_saved_at
        return (state.samples_seen > newest and (self.done or due or best)) or (evaluated and (self.done or best))

    def log_due(self, ahead: int = 0) -> bool:
        """Whether measurements are written after this step, or after the one that is so many steps ahead."""
        step = self.state.step + ahead
        return step == 1 or step % self.schedule.log_every == 0 or step >= self.schedule.total_steps

    def evaluate(self) -> None:
        """Evaluate the weights and, where it is kept, their moving average. A stop leaves nothing of either."""
        results: dict[str, tuple[Evaluation, float]] = {}
        with self._outside_training(), self.optimizer_shards.buffers.averaged():
            for kind in ("eval", "eval_average")[: 1 + (self.recipe.ema is not None)]:
                began = time.monotonic()
                with self.optimizer_shards.averaged_weights() if kind == "eval_average" else nullcontext():
                    result = self._evaluate()
                if result is None:
                    return
                results[kind] = result, time.monotonic() - began
            attention = self.monitor.attention()
        for kind, (result, seconds) in results.items():
            self.log.result(kind, result, seconds)
        if attention is not None:
            self.log.attention(*attention)
        self.state.record_evaluation(asdict([*results.values()][-1][0]))

    def _evaluate(self) -> Evaluation | None:
        self.watchdog.beat("evaluating")
        self.engine.eval()
        verdicts = evaluate(
            lambda images: self.engine(images.to(self.dtype)),
            self.eval_loader,
            levels=self.loss.classification.levels,
            stop=lambda: self._stopped_while("evaluating"),
            observe=self.monitor.see_evaluation,
        )
        self.engine.train()
        return None if verdicts is None else verdicts.total()

    def probe(self) -> None:
        """Probe the features of the weights that are handed off. A stop leaves nothing of it."""
        assert self.probes is not None
        began = time.monotonic()
        self.watchdog.beat("probing")
        average = self.optimizer_shards.averaged_weights() if self.recipe.ema is not None else nullcontext()
        result = None
        with self._outside_training(), self.optimizer_shards.buffers.averaged(), average:
            try:
                result = self.probes.run(self.engine, self.dtype, stop=lambda: self._stopped_while("probing"))
            except ProbesEndedError as ended:  # on all ranks alike
                if ended.why == "stopped":
                    return
        if result is None:
            limit = self.probes.section.time_limit_minutes
            self.log.say(f"WARNING probes abandoned after {limit:g} minutes (probes.time_limit_minutes)")
        else:
            self.log.result("probe", result, time.monotonic() - began)
        self.state.probed_at = self.state.samples_seen

    def _stopped_while(self, phase: str) -> bool:
        self.watchdog.beat(phase)
        return self.stop.at_step_boundary()

    def save(self, *, wait: bool = False) -> None:
        """Begin a checkpoint, which is written while training continues; the last one is waited for, as with ``wait``.

        Raises:
            UserError: the second one in a row, or the last of the run, could not be written.
        """
        self.finish_save()
        with self._outside_training():
            self.record_steps()
            self._count_seconds()
            self.watchdog.beat("copying a checkpoint", startup=True)
            self.state.save_tried_at = self.state.samples_seen
            self.state.evaluation_saved_at = self.state.evaluated_at
            self.state.loss_scale = self.nonfinite.loss_scale()
            self.log.flush()  # first: what a checkpoint has seen is never measured again
            self.writer.start(self.state)
        if wait or self.done or self.state.failed_saves:  # after a failure the outcome is wanted at once
            self.finish_save()

    def finish_save(self) -> None:
        """Wait for the checkpoint that is being written, if any. One failure is reported and survived.

        Raises:
            UserError: the second one in a row, or the last of the run, could not be written.
        """
        if not self.writer.busy:
            return
        with self._outside_training():
            self.watchdog.beat("waiting for a checkpoint to be written", startup=True)
            problem = self.writer.finish(hurry=self.stop.agreed or not self.done)
        state = self.state
        if not problem:
            state.saved_at, state.failed_saves = state.save_tried_at, 0
            return
        state.failed_saves += 1
        self.log.event("checkpoint failed", problem)
        last = self.done and state.save_tried_at == state.samples_seen
        if state.failed_saves > 1 or last:  # by the next one there may be space again
            raise UserError(
                f"{'the last checkpoint' if last else 'two checkpoints in a row'} could not be written to "
                f"{self.log.folder.checkpoints} ({problem}): make space or repair the storage, then start again",
                ExitCode.WILL_FAIL_AGAIN if self.writer.lasting else ExitCode.RETRY,
            )

    def handle_skipped_steps(self, *, skip_last: int = 0) -> None:
        """Count the steps that were skipped for non-finite gradients; after too many in a row, roll back.

        Args:
            skip_last: the newest so many steps are left for later, so that the host need not wait for them.

        Raises:
            UserError: rolling back did not help as often as the recipe allows, or there is no checkpoint for it.
        """
        skipped = self.nonfinite.skipped(skip_last=skip_last)
        for index, was_skipped in enumerate(skipped):
            if not was_skipped:
                self.state.skipped_in_a_row = 0
                continue
            since = skip_last + len(skipped) - 1 - index
            self.state.skipped_steps += 1
            self.state.skipped_in_a_row += 1
            end = self.state.samples_seen - since * self.batch.global_batch
            where = f"images {end - self.batch.global_batch} to {end - 1} of the order"
            self.log.say(f"WARNING step {self.state.step - since} was skipped: a gradient was not finite; {where}")
            if self.state.skipped_in_a_row >= self.recipe.bad_numbers.skipped_steps:
                self._roll_back(where)
                self.state.skipped_steps += sum(skipped[index + 1 :])
                break

    def _roll_back(self, where: str) -> None:
        """Load the weights of the newest checkpoint before the skipped steps; the position in the data stays."""
        state, allowed, group = self.state, self.recipe.bad_numbers.rollbacks, self.stop.group
        why = f"{state.skipped_in_a_row} steps in a row had gradients that were not finite, the last on {where}"
        advice = "lower optimizer.lr or lengthen schedule.warmup_epochs, under a new name"
        if state.rollbacks >= allowed:
            raise UserError(f"{why}, after going back {state.rollbacks} times: {advice}")
        self.finish_save()
        self.watchdog.beat("going back to a checkpoint", startup=True)
        folder = self.log.folder.checkpoints
        loaded = load_newest(folder, self.optimizer_shards, group=group, good=lambda found: not found.skipped_in_a_row)
        if loaded is None:
            raise UserError(f"{why}, and there is no checkpoint to roll back to: {advice}")
        for warning in loaded[1]:
            self.log.say(f"WARNING {warning}")
            self.log.event("checkpoint passed over", warning)
        self.nonfinite.set_loss_scale(loaded[0].loss_scale)
        state.skipped_steps += sum(self.nonfinite.skipped())  # of steps that the old weights took meanwhile
        state.rollbacks += 1
        state.skipped_in_a_row = 0
        what = f"{why}: rolled back to the weights of step {loaded[0].step}, continuing after these images"
        self.log.event("went back", what)
        self.log.say(f"WARNING {what} ({state.rollbacks} of {allowed} times)")

    def record_steps(self) -> None:
        """Write all steps since the last call into the ledger, and losses far above their level. Collective."""
        self.handle_skipped_steps()
        rows = self.monitor.take(self.state)
        self.log.steps(rows, self.loss_level.spikes(rows, self.batch.global_batch), self.train_loader.samples)

    def log_interval(self, learning_rate: float) -> None:
        """Measure the interval since the last one, and write it. Collective."""
        self.record_steps()
        state, batch = self.state, self.batch.global_batch
        rows, images_requested = self.monitor.measure(
            global_batch=batch, images_requested=self.log.take_image_request()
        )
        losses = self.monitor.means() | {"lr": learning_rate, "skipped_steps": state.skipped_steps}
        if "grad_norm" in rows["train"]:
            losses["grad_norm"] = rows["train"]["grad_norm"]
        self.log.interval(losses, rows, self.monitor.training_images())
        if images_requested:
            self._show_images()
        gc.collect()
        self.monitor.reset()

    def _show_images(self) -> None:
        """Draw attention now, and the next training batch with the next interval."""
        with self._outside_training():
            attention = self.monitor.attention()
        if attention is not None:
            self.log.attention(None, attention[1])
        self.monitor.show_batch = dist.get_rank() == 0

    def _end_startup(self) -> None:
        """Compilation is over: shorten the limits of the watchdog and of collectives."""
        self.watchdog.starting = False
        self.startup.end("first step")
        self.log.say(self.startup.table())
        # From here on garbage is collected between steps: within one it would hold up all ranks for 0.2 s (measured).
        gc.collect()
        gc.freeze()
        gc.disable()
        limit = 60 * self.recipe.watchdog.step_minutes + REPORT_FIRST_S
        limit_collectives(limit, exclude=(self.stop.group, self.writer.group))

    def _stop(self) -> ExitCode:
        """Save what a stop leaves, and record it."""
        state = self.state
        self.finish_save()
        if state.saved_at != state.samples_seen and state.samples_seen:
            self.save(wait=True)
        reason = self.stop.reason()
        saved = state.saved_at == state.samples_seen
        outcome = "saved; the same command resumes from here" if saved else "nothing new was saved"
        self.log.say(f"stopped at step {state.step} of {self.schedule.total_steps} ({reason}), {outcome}")
        self.log.status.write("preempted", reason)
        return ExitCode.STOPPED

    def _finish(self) -> None:
        """Hand off the final weights and write the summary; rank 0 does it, the others wait."""
        self.watchdog.beat("handing off", startup=True)
        self._count_seconds()
        if dist.get_rank() == 0:
            export_run(self.log.folder, step=self.state.step, trust_factory=True)
            write_summary(self.log.folder, self.state)
            self.log.status.write("finished")
        dist.barrier(self.stop.group)

    def close(self) -> None:
        """Free the loaders, flush metrics, restore the terminal."""
        self.watchdog.close()
        if self.profiler is not None:
            self.profiler.close()
        self.train_loader.close()
        self.eval_loader.close()
        self.log.close()
        gc.unfreeze()
        gc.enable()

    @contextmanager
    def _outside_training(self) -> Iterator[None]:
        """Keep the time of the block out of the rates of training."""
        began = time.monotonic()
        with self.monitor.excluded():
            yield
            gc.collect()
        self.log.console.step_done(self.state.step, waited_s=time.monotonic() - began)

    def _count_seconds(self) -> None:
        """Add the time since the last call to that of the run."""
        now = time.monotonic()
        self.state.train_seconds += now - self._clock
        self._clock = now
