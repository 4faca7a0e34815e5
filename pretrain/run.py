"""One run on one rank: all its parts, and what is done with them between steps."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.loader import EvalLoader, TrainLoader
from pretrain.checkpoint import Progress, load_newest, save_checkpoint
from pretrain.console import RunConsole
from pretrain.deepspeed_config import BatchPlan
from pretrain.evaluate import evaluate
from pretrain.export import export_run
from pretrain.meter import Meter
from pretrain.metrics import MetricsWriter
from pretrain.outcome import UserError
from pretrain.pieces import OptimizerPieces
from pretrain.recipe import Recipe
from pretrain.run_folder import RunFolder
from pretrain.run_state import RunState, State
from pretrain.stop import StopAgreement
from pretrain.summary import write_summary
from pretrain.watchdog import Watchdog

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
    pieces: OptimizerPieces
    train_loader: TrainLoader
    eval_loader: EvalLoader
    folder: RunFolder
    state: RunState
    metrics: MetricsWriter | None
    """On rank 0 only."""
    console: RunConsole
    stop: StopAgreement
    control: dist.ProcessGroup
    """CPU group for small objects."""
    progress: Progress
    watchdog: Watchdog
    first_step: bool = True
    """Whether no step was taken yet by this incarnation: the first one may build and compile for minutes."""
    saved_at: int = -1
    """``samples_seen`` of the newest checkpoint on disk."""
    save_tried_at: int = -1
    """``samples_seen`` of the newest attempt, which may have failed."""
    failed_saves: int = 0
    meter: Meter = field(init=False)

    def __post_init__(self) -> None:
        self.meter = Meter(self.device)
        self.watchdog.on_hang = lambda reason: self.write_state("failed", reason)

    @property
    def done(self) -> bool:
        """Whether all steps are taken."""
        return self.progress.step >= self.total_steps

    @property
    def epoch(self) -> float:
        """Passes over the training split so far."""
        return self.progress.samples_seen / self.epoch_size

    def evaluation_due(self) -> bool:
        """Whether an evaluation boundary was passed, or the end reached, and not yet evaluated."""
        interval = self.recipe.evaluation.every_epochs * self.epoch_size
        seen, evaluated = self.progress.samples_seen, self.progress.evaluated_at
        return seen // interval > evaluated // interval or (self.done and evaluated < seen)

    def checkpoint_due(self) -> bool:
        """Whether a checkpoint stands at this step and is not yet on disk."""
        seen, newest = self.progress.samples_seen, max(self.saved_at, self.save_tried_at, 0)
        due = seen - newest >= self.recipe.checkpoint.every_steps * self.batch.global_batch
        return seen > newest and (self.done or (due and not self.progress.skipped_in_a_row))

    def evaluate(self) -> None:
        """Evaluate the weights, and their average where it is kept, and write it down; a stop leaves it undone."""
        began = time.monotonic()
        complete = self._evaluate("eval")
        if complete and self.recipe.ema is not None:
            with self.pieces.averaged_weights():
                complete = self._evaluate("eval_average")
        if complete:
            self.progress.evaluated_at = self.progress.samples_seen
        took = time.monotonic() - began
        self.progress.train_seconds += took
        self._interval_broken(took)

    def _evaluate(self, kind: str) -> bool:
        began = time.monotonic()
        self.engine.eval()

        def stopped() -> bool:
            self.watchdog.beat("evaluating", patient=self.first_step)
            return self.stop.at_step_boundary()

        result = evaluate(lambda images: self.engine(images.to(self.dtype)), self.eval_loader, stop=stopped)
        self.engine.train()
        if result is None:
            return False
        self.progress.evaluation = asdict(result)
        self.console.say(f"{kind}  epoch {self.epoch:.2f}  {result}")
        if self.metrics:
            values: dict[str, float] = {
                "step": self.progress.step,
                "epoch": round(self.epoch, 4),
                **asdict(result),
                "seconds": round(time.monotonic() - began, 3),
            }
            self._tell(lambda metrics: metrics.write(kind, self.progress.samples_seen, values))
        return True

    def save(self) -> None:
        """Write a checkpoint. Failing once is told and survived, failing twice in a row ends the run.

        Raises:
            UserError: the second failure in a row, or the last checkpoint of the run failed.
        """
        began = time.monotonic()
        self.watchdog.beat("saving a checkpoint", patient=True)
        self.save_tried_at = self.progress.samples_seen
        problem = save_checkpoint(
            self.folder.checkpoints,
            self.pieces,
            self.progress,
            group=self.control,
            keep=self.recipe.checkpoint.keep,
            facts={"run": self.recipe.name},
        )
        took = time.monotonic() - began
        self.progress.train_seconds += took
        self._interval_broken(took)
        if not problem:
            self.saved_at, self.failed_saves = self.progress.samples_seen, 0
            self._tell(lambda metrics: metrics.flush())
            return
        self.failed_saves += 1
        self.console.say(f"WARNING checkpoint at step {self.progress.step} could not be written: {problem}")
        if self.failed_saves > FAILED_SAVES_ALLOWED or self.done:
            raise UserError(
                f"{'the last checkpoint' if self.done else 'two checkpoints in a row'} could not be written to "
                f"{self.folder.checkpoints} ({problem}): make space or mend the storage, then start again"
            )

    def note_step(self, *, skipped: bool) -> None:
        """Count a step that was skipped because a gradient was not finite; after too many in a row, go back.

        Raises:
            UserError: going back did not help as often as the recipe allows, or there is nothing to go back to.
        """
        progress, limits = self.progress, self.recipe.bad_numbers
        if not skipped:
            progress.skipped_in_a_row = 0
            return
        progress.skipped_steps += 1
        progress.skipped_in_a_row += 1
        first = progress.samples_seen - self.batch.global_batch
        where = f"images {first} to {progress.samples_seen - 1} of the order"
        self.console.say(f"WARNING step {progress.step} was skipped: a gradient was not finite; {where}")
        if progress.skipped_in_a_row < limits.skipped_steps:
            return
        why = f"{progress.skipped_in_a_row} steps in a row had gradients that were not finite, the last on {where}"
        cure = "lower optimizer.lr or lengthen schedule.warmup_epochs, under a new name"
        if progress.rollbacks >= limits.rollbacks:
            raise UserError(f"{why}, after going back {progress.rollbacks} times: {cure}")
        self.watchdog.beat("going back to a checkpoint", patient=True)
        loaded = load_newest(
            self.folder.checkpoints, self.pieces, group=self.control, good=lambda found: not found.skipped_in_a_row
        )
        if loaded is None:
            raise UserError(f"{why}, and there is no checkpoint to go back to: {cure}")
        for warning in loaded[1]:
            self.console.say(f"WARNING {warning}")
        progress.rollbacks += 1
        progress.skipped_in_a_row = 0
        self.console.say(
            f"WARNING {why}: back to the weights of step {loaded[0].step}, going on behind these images "
            f"({progress.rollbacks} of {limits.rollbacks} times)"
        )

    def log_due(self) -> bool:
        """Whether the metrics of an interval are written after this step."""
        return self.progress.step % self.recipe.log_every_steps == 0 or self.done

    def log(self, lr: float) -> None:
        """Write the interval's means as metrics and as a line; collective."""
        values = self.meter.means()
        norm = self.engine.get_global_grad_norm()
        values |= {"lr": lr, "skipped_steps": self.progress.skipped_steps} | (
            {"grad_norm": float(norm)} if norm is not None else {}
        )
        seconds = self.meter.seconds()
        rate = self.meter.steps * self.batch.global_batch / seconds
        self.console.log_metrics(self.progress.step, self.epoch, values)
        if self.metrics:
            line = {
                "step": self.progress.step,
                "epoch": round(self.epoch, 4),
                **values,
                "images_per_second": round(rate, 2),
                "data_wait": round(self.meter.data_wait_s / seconds, 4),
            }
            self._tell(lambda metrics: metrics.write("train", self.progress.samples_seen, line))
            self._tell(lambda _: self.write_state("running"))
        self.meter.reset()

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
            self.write_state("finished")
        dist.barrier(self.control)

    def write_state(self, state: State, reason: str = "") -> None:
        """Write ``run.json``; on rank 0."""
        if self.metrics:
            self.state.state, self.state.reason = state, reason
            self.state.step, self.state.samples_seen = self.progress.step, self.progress.samples_seen
            self.folder.write_state(self.state)

    def close(self) -> None:
        """Free loaders, flush metrics, give the terminal back."""
        self.watchdog.close()
        self.train_loader.close()
        self.eval_loader.close()
        self.console.close()
        if self.metrics:
            self.metrics.close()

    def _tell(self, write: Callable[[MetricsWriter], None]) -> None:
        """Write what only informs; when the disk refuses, say so and train on."""
        if self.metrics:
            try:
                write(self.metrics)
            except OSError as error:
                self.console.say(f"WARNING metrics or state could not be written: {error}")

    def _interval_broken(self, seconds: float) -> None:
        """Keep time that was not training out of the rates."""
        self.meter.exclude(seconds)
        self.console.step_done(self.progress.step, waited_s=seconds)
