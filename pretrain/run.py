"""One run on one rank: all its parts, and what is done with them between steps."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.loader import EvalLoader, TrainLoader
from pretrain import garbage
from pretrain.checkpoints.checkpoint import load_newest
from pretrain.checkpoints.optimizer_shards import OptimizerShards
from pretrain.checkpoints.writer import CheckpointWriter
from pretrain.console import RunConsole
from pretrain.engine.deepspeed_config import BatchPlan
from pretrain.engine.distributed import limit_collectives
from pretrain.engine.schedule import checkpoint_interval, log_interval
from pretrain.evaluation.accuracy import evaluate
from pretrain.evaluation.probes import Probes, ProbesEndedError
from pretrain.export import export_run
from pretrain.fault_tolerance.bad_steps import BadSteps
from pretrain.fault_tolerance.stop import StopAgreement
from pretrain.fault_tolerance.watchdog import SPEAKS_FIRST_S, Watchdog
from pretrain.logbook import Logbook
from pretrain.losses import Classification
from pretrain.meter import Meter
from pretrain.metrics import MetricsWriter
from pretrain.monitoring.monitor import Monitor
from pretrain.monitoring.profile import StepProfiler
from pretrain.outcome import UserError
from pretrain.recipe import Recipe
from pretrain.run_folder import RunFolder
from pretrain.run_state import RunState
from pretrain.state import TrainState
from pretrain.summary import write_summary

FAILED_SAVES_ALLOWED = 1
"""A checkpoint that could not be written is tolerated once in a row: by the next interval there may be space again."""


@dataclass
class Run:
    """The parts of a run on this rank. ``progress`` is the only state; all else is how."""

    recipe: Recipe
    batch: BatchPlan
    epoch_size: int
    """Pictures in the training split."""
    total_steps: int
    device: torch.device
    engine: Any
    dtype: torch.dtype
    """What the engine computes in."""
    optimizer_shards: OptimizerShards
    bad_steps: BadSteps
    writer: CheckpointWriter
    classification: Classification
    train_loader: TrainLoader
    eval_loader: EvalLoader
    probes: Probes | None
    folder: RunFolder
    state: RunState
    metrics: MetricsWriter | None
    """On rank 0 only."""
    console: RunConsole
    stop: StopAgreement
    control: dist.ProcessGroup
    """CPU group for small objects."""
    progress: TrainState
    watchdog: Watchdog
    monitor: Monitor
    profiler: StepProfiler | None = None
    first_step: bool = True
    """Whether no step was taken yet by this incarnation: the first one may build and compile for minutes."""
    saved_at: int = -1
    """``samples_seen`` of the newest checkpoint on disk."""
    save_tried_at: int = -1
    """``samples_seen`` of the newest attempt, which may have failed."""
    failed_saves: int = 0
    meter: Meter = field(init=False)
    logbook: Logbook = field(init=False)

    def __post_init__(self) -> None:
        self.meter = Meter(self.device)
        self.logbook = Logbook(
            self.folder,
            self.state,
            self.progress,
            metrics=self.metrics,
            console=self.console,
            monitor=self.monitor,
            epoch_size=self.epoch_size,
        )
        self.watchdog.on_hang = self.logbook.fail
        self.monitor.norms.due = lambda: self.log_due(ahead=1)

    @property
    def done(self) -> bool:
        """Whether all steps are taken."""
        return self.progress.step >= self.total_steps

    def evaluation_due(self) -> bool:
        """Whether an evaluation boundary was passed, or the end reached, and not yet evaluated."""
        return self._passed(self.recipe.evaluation.every_epochs, self.progress.evaluated_at)

    def probes_due(self) -> bool:
        """The same for the probes, where the recipe has any."""
        section = self.recipe.probes
        return section is not None and self._passed(section.every_epochs, self.progress.probed_at)

    def _passed(self, every_epochs: float, last: int) -> bool:
        """Whether a multiple of so many epochs, or the end, lies between the images seen at ``last`` and now."""
        interval, seen = every_epochs * self.epoch_size, self.progress.samples_seen
        return seen // interval > last // interval or (self.done and last < seen)

    def checkpoint_due(self) -> bool:
        """Whether a checkpoint stands at this step and is not yet on disk."""
        seen, newest = self.progress.samples_seen, max(self.saved_at, self.save_tried_at, 0)
        due = seen - newest >= checkpoint_interval(self.recipe, self.total_steps) * self.batch.global_batch
        best = self.recipe.checkpoint.keep_best and self.progress.best_at == seen
        if seen <= newest or not (self.done or due or best):
            return False
        self.note_steps()
        return self.done or not self.progress.skipped_in_a_row

    def evaluate(self) -> None:
        """Evaluate the weights, and their average where it is kept, and write it down; a stop leaves it undone."""
        with self._beside_training():
            complete = self._evaluate("eval")
            if complete and self.recipe.ema is not None:
                with self.optimizer_shards.averaged_weights():
                    complete = self._evaluate("eval_average")
            if complete:
                self._show_attention(self.logbook.where())
        if complete:
            self.progress.evaluated_at = self.progress.samples_seen
            if self.progress.evaluation["top1"] > self.progress.best_top1:
                self.progress.best_top1 = self.progress.evaluation["top1"]
                self.progress.best_at = self.progress.samples_seen

    def _evaluate(self, kind: str) -> bool:
        began = time.monotonic()
        self.watchdog.beat("evaluating", patient=self.first_step)
        self.engine.eval()
        result = evaluate(
            lambda images: self.engine(images.to(self.dtype)),
            self.eval_loader,
            levels=self.classification.levels,
            stop=lambda: self._stopped_while("evaluating"),
            observe=self.monitor.keep,
        )
        self.engine.train()
        if result is None:
            return False
        self.progress.evaluation = asdict(result)
        self.logbook.result(kind, result, seconds=time.monotonic() - began)
        return True

    def probe(self) -> None:
        """Probe the features of the weights that are handed off, and write it down; a stop leaves it undone."""
        assert self.probes is not None
        began = time.monotonic()
        self.watchdog.beat("probing", patient=self.first_step)
        average = self.optimizer_shards.averaged_weights() if self.recipe.ema is not None else nullcontext()
        with self._beside_training():
            try:
                with average:
                    result = self.probes.run(self.engine, self.dtype, stop=lambda: self._stopped_while("probing"))
            except ProbesEndedError as ended:
                if ended.why == "stopped":
                    return
                limit = self.probes.section.time_limit_minutes
                self.console.say(f"WARNING probes abandoned after {limit:g} minutes (probes.time_limit_minutes)")
            else:
                self.logbook.result("probe", result, seconds=time.monotonic() - began)
        self.progress.probed_at = self.progress.samples_seen

    def _stopped_while(self, doing: str) -> bool:
        self.watchdog.beat(doing, patient=self.first_step)
        return self.stop.at_step_boundary()

    def first_step_done(self) -> None:
        """What is compiled and built is there now: from here on a collective that takes long is one that hangs."""
        self.first_step = False
        garbage.keep_out_of_steps()
        limit = 60 * self.recipe.watchdog.step_minutes + SPEAKS_FIRST_S
        limit_collectives(limit, but=(self.control, self.writer.group))

    def save(self, *, wait: bool = False) -> None:
        """Begin a checkpoint, which is written while training goes on, or ``wait`` for it; the last one is waited for.

        Raises:
            UserError: the second one in a row, or the last of the run, could not be written.
        """
        self.settle_save()
        with self._beside_training():
            self.note_steps()
            self.watchdog.beat("copying a checkpoint", patient=True)
            self.save_tried_at = self.progress.samples_seen
            self.progress.loss_scale = self.bad_steps.loss_scale()
            self.logbook.flush()  # before it: what a checkpoint has seen is never told again
            self.writer.start(self.progress)
        if wait or self.done or self.failed_saves:  # after a failure the answer is wanted at once
            self.settle_save()

    def settle_save(self) -> None:
        """Wait for the checkpoint that is being written, if any. Failing once is told and survived.

        Raises:
            UserError: the second one in a row, or the last of the run, could not be written.
        """
        if not self.writer.busy:
            return
        with self._beside_training():
            self.watchdog.beat("waiting for a checkpoint to be written", patient=True)
            problem = self.writer.settle()
        if not problem:
            self.saved_at, self.failed_saves = self.save_tried_at, 0
            return
        self.failed_saves += 1
        self.logbook.event("checkpoint failed", problem)
        last = self.done and self.save_tried_at == self.progress.samples_seen
        if self.failed_saves > FAILED_SAVES_ALLOWED or last:
            raise UserError(
                f"{'the last checkpoint' if last else 'two checkpoints in a row'} could not be written to "
                f"{self.folder.checkpoints} ({problem}): make space or mend the storage, then start again"
            )

    def note_steps(self, *, but: int = 0) -> None:
        """Count the steps that were skipped because a gradient was not finite; after too many in a row, go back.

        Args:
            but: the newest so many steps are left for later, so that the host need not wait for them.

        Raises:
            UserError: going back did not help as often as the recipe allows, or there is nothing to go back to.
        """
        flags = self.bad_steps.settled(but=but)
        for since, skipped in zip(range(but + len(flags) - 1, but - 1, -1), flags, strict=True):
            if skipped:
                self._note_skipped(since)
            else:
                self.progress.skipped_in_a_row = 0

    def _note_skipped(self, since: int) -> None:
        """Count the step that was taken ``since`` steps before the newest, and go back where it is one too many."""
        progress, limits = self.progress, self.recipe.bad_numbers
        progress.skipped_steps += 1
        progress.skipped_in_a_row += 1
        end = progress.samples_seen - since * self.batch.global_batch
        where = f"images {end - self.batch.global_batch} to {end - 1} of the order"
        self.console.say(f"WARNING step {progress.step - since} was skipped: a gradient was not finite; {where}")
        if progress.skipped_in_a_row < limits.skipped_steps:
            return
        why = f"{progress.skipped_in_a_row} steps in a row had gradients that were not finite, the last on {where}"
        cure = "lower optimizer.lr or lengthen schedule.warmup_epochs, under a new name"
        if progress.rollbacks >= limits.rollbacks:
            raise UserError(f"{why}, after going back {progress.rollbacks} times: {cure}")
        self.settle_save()
        self.watchdog.beat("going back to a checkpoint", patient=True)
        loaded = load_newest(
            self.folder.checkpoints,
            self.optimizer_shards,
            group=self.control,
            good=lambda found: not found.skipped_in_a_row,
        )
        if loaded is None:
            raise UserError(f"{why}, and there is no checkpoint to go back to: {cure}")
        for warning in loaded[1]:
            self.console.say(f"WARNING {warning}")
        progress.rollbacks += 1
        progress.skipped_in_a_row = 0
        what = f"{why}: back to the weights of step {loaded[0].step}, going on behind these images"
        self.logbook.event("went back", what)
        self.console.say(f"WARNING {what} ({progress.rollbacks} of {limits.rollbacks} times)")

    def log_due(self, ahead: int = 0) -> bool:
        """Whether the metrics of an interval are written after this step, or after the one so many steps ahead."""
        step = self.progress.step + ahead
        return step % log_interval(self.recipe, self.total_steps) == 0 or step >= self.total_steps

    def log(self, lr: float) -> None:
        """Write the interval's means as metrics and as a line; collective."""
        self.note_steps()
        values = self.meter.means()
        norm = self.engine.get_global_grad_norm()
        norm = None if norm is None else float(norm)
        values |= {"lr": lr, "skipped_steps": self.progress.skipped_steps}
        values |= {} if norm is None else {"grad_norm": norm}
        rate = self.meter.steps * self.batch.global_batch / self.meter.seconds()
        measured, pictures = self.monitor.measure(
            self.meter.timer, steps=self.meter.steps, images_per_second=rate, grad_norm=norm
        )
        self.logbook.interval(values, measured, images_per_second=rate, pictures=pictures)
        if pictures:
            with self._beside_training():
                self._show_attention(None)
        garbage.collect()
        self.meter.reset()

    def _show_attention(self, where: dict[str, float] | None) -> None:
        try:
            self.monitor.look(self.metrics, self.progress.samples_seen, where)
        except OSError as error:
            self.console.say(f"WARNING attention could not be written: {error}")

    def profile(self) -> None:
        """Begin or end the profile that was asked for, where its first or last step is next or done."""
        if self.profiler is not None:
            told = self.profiler.between_steps(self.progress.step, self.meter.timer)
            if told:
                self.console.say(told)

    def finish(self) -> None:
        """Hand off the final weights and write the summary; rank 0 does it, the others wait."""
        self.watchdog.beat("handing off", patient=True)
        if self.metrics:
            export_run(self.folder, step=self.progress.step)
            write_summary(
                self.folder,
                top1=self.progress.evaluation["top1"],
                train_images=self.progress.samples_seen,
                seconds=self.progress.train_seconds,
            )
            self.logbook.write_state("finished")
        dist.barrier(self.control)

    def close(self) -> None:
        """Free loaders, flush metrics, give the terminal back."""
        self.watchdog.close()
        if self.profiler is not None and (told := self.profiler.abandon()):
            self.console.say(told)
        self.train_loader.close()
        self.eval_loader.close()
        self.console.close()
        if self.metrics:
            self.metrics.close()
        garbage.let_it_run()

    @contextmanager
    def _beside_training(self) -> Iterator[None]:
        """Count what is done within it as time of the run, but keep it out of the rates of training."""
        began = time.monotonic()
        with self.meter.excluded():
            yield
            garbage.collect()
        took = time.monotonic() - began
        self.progress.train_seconds += took
        self.console.step_done(self.progress.step, waited_s=took)
