"""Evaluation: every picture of a split exactly once, on any number of ranks.

``python -m pretrain.evaluate`` is the door for hand-offs.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console

from data_pipeline.dataset import Dataset
from data_pipeline.errors import DataError
from data_pipeline.loader import BadSample, EvalLoader
from models import within_level
from pretrain.distributed import choose_device, read_rank
from pretrain.handoff import is_handoff, load_handoff
from pretrain.outcome import ExitCode, UserError
from pretrain.run_folder import RunFolder
from pretrain.summary import record_handoff_evaluation, summary_lines


@dataclass(frozen=True)
class Evaluation:
    """Result over a whole split."""

    top1: float
    """Share of pictures whose highest score is their label, in percent."""
    top5: float
    """Share of pictures whose label is among the five highest scores (all, below five classes), in percent."""
    loss: float
    """Mean cross-entropy in nats, without label smoothing."""
    samples: int
    """Pictures evaluated: the split's size."""

    def __str__(self) -> str:
        correct = round(self.top1 * self.samples / 100)
        return f"top-1 {self.top1:.2f} % ({correct} of {self.samples})  top-5 {self.top5:.2f} %  loss {self.loss:.4f}"


@torch.no_grad()
def evaluate(
    forward: Callable[[torch.Tensor], torch.Tensor],
    loader: EvalLoader,
    *,
    levels: torch.Tensor | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Evaluate a classifier. Collective where a process group exists.

    Args:
        forward: images (b, 3, H, W) fp32 -> logits (b, classes).
        loader: this rank's share; it has equally many batches on every rank.
        levels: (classes,) int64 on the logits' device: level of each class in the hierarchy of semantic softmax. A
            label then competes with the classes of its own level only.
        stop: polled at every batch; must give the same answer on every rank.

    Returns:
        the result over all ranks, or None when stopped.
    """
    totals: torch.Tensor | None = None
    for batch in loader:
        if stop():
            return None
        logits = forward(batch.images).float()
        if levels is not None:
            logits = within_level(logits, batch.labels, levels)
        valid = torch.from_numpy(batch.valid).to(logits.device)
        losses = F.cross_entropy(logits, batch.labels, reduction="none")
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == batch.labels[:, None]
        sums = torch.stack(
            [
                (ranked[:, 0] & valid).sum().double(),
                (ranked.any(1) & valid).sum().double(),
                torch.where(valid, losses, 0.0).double().sum(),
                valid.sum().double(),
            ]
        )
        totals = sums if totals is None else totals + sums
    if totals is None:
        raise UserError("the split to evaluate is empty")
    if dist.is_initialized():
        dist.all_reduce(totals)
    top1, top5, loss, count = totals.tolist()
    return Evaluation(100 * top1 / count, 100 * top5 / count, loss / count, int(count))


def main(arguments: list[str] | None = None) -> int:
    """Evaluate a hand-off on a split and print the result; for a run also write it down and show the summary."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.evaluate", description=main.__doc__)
    parser.add_argument("target", type=Path, metavar="RUN_OR_HANDOFF", help="runs/NAME, or a hand-off folder")
    parser.add_argument("--data", type=Path, required=True, help="folder of the dataset")
    parser.add_argument("--split", default="val", help="default: val")
    parser.add_argument("--batch-size", type=int, default=64, help="default: 64")
    options = parser.parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    try:
        folder = None if is_handoff(options.target) else RunFolder(options.target)
        handoff = folder.handoff if folder else options.target
        result = evaluate_handoff(handoff, options.data, split=options.split, batch_size=options.batch_size)
        console.print(f"hand-off {handoff} on {options.data} {options.split}: {result}")
        if folder is not None and folder.summary.exists():
            if _is_the_runs_own(folder, options.data, options.split):
                record_handoff_evaluation(folder, result.top1)
            console.print("\n".join(summary_lines(folder)), markup=False)
    except (UserError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return ExitCode.WILL_FAIL_AGAIN
    return ExitCode.FINISHED


def evaluate_handoff(handoff: Path, data: Path, *, split: str, batch_size: int) -> Evaluation:
    """Load a hand-off as anyone would and evaluate it in this process, in fp32.

    Raises:
        UserError: the hand-off is damaged, or its classes are not the dataset's.
        DataError: the dataset or the split does not exist or is damaged.
    """
    model, config = load_handoff(handoff)
    dataset = Dataset.open(data, split, config.input.cache)
    if dataset.num_classes != config.num_classes:
        raise UserError(f"{handoff} has {config.num_classes} classes and {data} has {dataset.num_classes}")
    rank = read_rank()
    device = choose_device(rank)
    model = model.to(device).eval()
    loader = EvalLoader(
        dataset,
        config.input.model_copy(update={"path": data}),
        batch_size=batch_size,
        rank=0,
        world_size=1,
        device=device,
        on_bad_sample=_tell_bad_sample,
    )
    try:
        levels = None if config.class_levels is None else torch.tensor(config.class_levels, device=device)
        result = evaluate(model, loader, levels=levels)
    finally:
        loader.close()
    assert result is not None
    return result


def _is_the_runs_own(folder: RunFolder, data: Path, split: str) -> bool:
    """Whether this is the split that training evaluated on; another's result is not the run's."""
    recipe = folder.read_recipe()
    assert recipe is not None
    return split == recipe["data"]["val_split"] and (
        Dataset.open(data, recipe["data"]["train_split"]).fingerprint == folder.read_dataset()["fingerprint"]
    )


def _tell_bad_sample(bad: BadSample) -> None:
    print(f"bad sample {bad.name} in {bad.shard}: {bad.reason}", file=sys.stderr)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
