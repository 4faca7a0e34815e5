"""What changes while a run trains."""

from dataclasses import dataclass, field


@dataclass
class TrainState:
    """All that changes during training and survives a restart; a checkpoint's manifest holds it as "progress".

    ``samples_seen`` is the position in the data. Whatever is due at a step is derived from this state.
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
    """Wall-clock time of the training loop over all attempts, without what was lost to a crash."""
    saved_at: int = -1
    """``samples_seen`` of the newest checkpoint on disk; -1 before the first."""
    save_tried_at: int = -1
    """``samples_seen`` of the newest checkpoint that was begun; it may have failed."""
    failed_saves: int = 0
    """Checkpoints in a row that could not be written."""

    def loaded(self) -> "TrainState":
        """This state as read from a checkpoint: the checkpoint itself is the newest on disk."""
        self.saved_at = self.save_tried_at = self.samples_seen
        self.failed_saves = 0
        return self
