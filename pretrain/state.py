"""What changes while a run trains."""

from dataclasses import dataclass, field


@dataclass
class TrainState:
    """All that changes during training and survives a restart; a checkpoint's manifest holds it as "progress".

    ``samples_seen`` is the position in the data. Whatever is due at a step is derived from this state. The last four
    fields describe the checkpoints of this attempt; ``reset_saves`` sets them after loading.
    """

    samples_seen: int = 0
    """Images trained on, counted over all epochs: the position in the global order."""
    step: int = 0
    """Optimizer steps."""
    evaluated_at: int = 0
    """``samples_seen`` of the last finished evaluation."""
    evaluation: dict[str, float] = field(default_factory=dict)
    """Its result for the weights that are handed off: top1 and top5 in percent, loss, samples."""
    probed_at: int = 0
    """``samples_seen`` of the last probes that finished or were abandoned."""
    best_top1: float = -1.0
    """The highest top-1 of all evaluations so far, in percent."""
    best_at: int = 0
    """``samples_seen`` of that evaluation."""
    skipped_steps: int = 0
    """Steps that left the weights as they were, because a gradient was not finite."""
    skipped_in_a_row: int = 0
    """Of these, the ones just before this point."""
    rollbacks: int = 0
    """How often the weights were rolled back to a checkpoint because of such steps."""
    loss_scale: dict[str, float] = field(default_factory=dict)
    """State of fp16's dynamic loss scale; empty in other precisions."""
    train_seconds: float = 0.0
    """Wall-clock time of the loop over all attempts, evaluations included, without what was lost to a crash."""
    saved_at: int = -1
    """``samples_seen`` of the newest checkpoint on disk; -1 before the first."""
    save_tried_at: int = -1
    """``samples_seen`` of the newest checkpoint that was begun; it may have failed."""
    evaluation_saved_at: int = -1
    """``evaluated_at`` in that checkpoint."""
    failed_saves: int = 0
    """Checkpoints in a row that could not be written."""

    def record_evaluation(self, result: dict[str, float]) -> None:
        """Take the result for the weights that are handed off, as of now."""
        self.evaluation, self.evaluated_at = result, self.samples_seen
        if result["top1"] > self.best_top1:
            self.best_top1, self.best_at = result["top1"], self.samples_seen

    def measured_until(self) -> dict[str, int]:
        """``samples_seen`` of the last measurement by its kind; what is not listed is measured up to here."""
        evaluations = dict.fromkeys(("eval", "eval_average", "attention"), self.evaluated_at)
        return evaluations | {"probe": self.probed_at}

    def reset_saves(self) -> None:
        """After loading: the checkpoint that held this state is the newest, and nothing failed yet."""
        self.saved_at = self.save_tried_at = self.samples_seen
        self.evaluation_saved_at = self.evaluated_at
        self.failed_saves = 0
