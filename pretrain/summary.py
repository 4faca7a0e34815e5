"""``summary.json``: what a finished run came to."""

from pretrain.files import read_sealed, write_sealed
from pretrain.outcome import UserError
from pretrain.run_folder import RunFolder
from pretrain.state import TrainState


def write_summary(folder: RunFolder, state: TrainState) -> None:
    """Write the summary of a finished run."""
    write_sealed(
        folder.summary,
        {
            "top1": state.evaluation["top1"],
            "train_images": state.samples_seen,
            "seconds": round(state.train_seconds, 2),
            "images_per_second": round(state.samples_seen / state.train_seconds, 2),
            "handoff_top1": None,
        },
    )


def record_handoff_evaluation(folder: RunFolder, top1: float) -> None:
    """Add the top-1 (percent) that ``pretrain.evaluate`` measured on the hand-off itself.

    Raises:
        UserError: ``summary.json`` is damaged.
    """
    write_sealed(folder.summary, read_sealed(folder.summary) | {"handoff_top1": top1})


def summary_lines(folder: RunFolder) -> list[str]:
    """The summary as lines for the terminal; a missing or damaged one is named in them."""
    try:
        summary = read_sealed(folder.summary)
        handoff = summary["handoff_top1"]
        results = [
            f"top-1         {summary['top1']:.2f} %" + (f" (hand-off: {handoff:.2f} %)" if handoff is not None else ""),
            (
                f"trained on    {summary['train_images']:,} images in {summary['seconds']:.0f} s "
                f"({summary['images_per_second']:.0f} images/s, evaluations included)"
            ),
        ]
    except (OSError, UserError, KeyError, ValueError, TypeError, OverflowError) as error:
        why = error if isinstance(error, UserError) else f"{folder.summary} is missing or damaged"
        results = [f"WARNING       {why}; metrics.jsonl has the results"]
    lines = [
        f"run           {folder.path}",
        *results,
        f"hand-off      {folder.handoff}",
        f"curves        tensorboard --logdir {folder.path.parent}",
    ]
    width = max(len(line) for line in lines)
    return ["-" * width, *lines, "-" * width]
