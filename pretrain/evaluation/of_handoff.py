"""The evaluation of a hand-off on a dataset, on any number of ranks."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.dataset import Dataset
from data_pipeline.loader import BadSample, EvalLoader
from models import LaViT
from pretrain.engine.distributed import Rank
from pretrain.evaluation.accuracy import Evaluation, evaluate
from pretrain.evaluation.class_match import ClassMatch, match_classes
from pretrain.evaluation.real_labels import RealLabels
from pretrain.evaluation.report import Recorder, report
from pretrain.handoff.folder import HandoffConfig, load_handoff
from pretrain.outcome import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Subject:
    """What is evaluated on what, checked and opened."""

    source: Path | str
    model: LaViT
    """In evaluation mode, on the device, in the precision that it computes in."""
    config: HandoffConfig
    dataset: Dataset
    classes: ClassMatch
    real: RealLabels | None
    batch_size: int
    precision: str


def open_subject(
    source: Path | str,
    data: Path | str,
    *,
    split: str,
    device: torch.device,
    precision: str = "fp32",
    batch_size: int | None = None,
    real: Path | None = None,
    by_position: bool = False,
) -> Subject:
    """Load the hand-off as anyone would, open the data, and see that they fit.

    Args:
        source: as for ``load_handoff``.
        data: the dataset's folder or URL.
        split: which of its splits.
        device: where the model goes.
        precision: a key of DTYPES.
        batch_size: per rank; None: that of the training's own evaluation.
        real: file for ``RealLabels``.
        by_position: as for ``match_classes``.

    Raises:
        UserError: the hand-off is damaged, its classes are not the data's, or the labels are about other pictures.
        DataError: the dataset or the split does not exist or is damaged.
    """
    model, config = load_handoff(source)
    dataset = Dataset.open(data, split, config.input.cache)
    classes = match_classes(config, dataset, by_position=by_position)
    size = batch_size or config.recipe.get("evaluation", {}).get("batch_size") or 64
    return Subject(
        source=source,
        model=model.to(device, DTYPES[precision]),
        config=config,
        dataset=dataset,
        classes=classes,
        real=None if real is None else RealLabels(real, dataset),
        batch_size=size,
        precision=precision,
    )


def examine(
    subject: Subject, rank: Rank, device: torch.device, control: dist.ProcessGroup | None = None
) -> tuple[Evaluation, dict[str, Any]]:
    """Evaluate, and report as JSON, of which all but "speed" is equal for any number of ranks. Collective.

    Args:
        subject: what is evaluated.
        rank: this process among the others.
        device: where the model is.
        control: CPU group of all ranks; None: there is one.

    Raises:
        UserError: a score is not a finite number, or the split is empty.
        DataError: too many samples are damaged.
    """
    config, dataset, columns = subject.config, subject.dataset, subject.classes.columns
    chosen = None if columns is None else torch.tensor(columns, device=device)
    levels = None if config.class_levels is None else torch.tensor(config.class_levels, device=device)
    if levels is not None and chosen is not None:
        levels = levels[chosen]

    def forward(images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = subject.model(images.to(DTYPES[subject.precision]))
        return logits if chosen is None else logits[:, chosen]

    loader = EvalLoader(
        dataset,
        config.input.model_copy(update={"path": dataset.path}),
        batch_size=subject.batch_size,
        rank=rank.rank,
        world_size=rank.world_size,
        local_ranks=rank.local_world_size,
        device=device,
        on_bad_sample=_tell_bad_sample,
    )
    began, recorder = time.monotonic(), Recorder(subject.real)
    try:
        result = evaluate(forward, loader, levels=levels, observe=recorder)
    finally:
        loader.close()
    assert result is not None
    seconds = time.monotonic() - began
    if result.not_finite:
        raise UserError(
            f"{subject.source}: the scores of {result.not_finite} of {result.samples} pictures are not finite numbers: "
            f"the weights are broken, or {subject.precision} is too narrow for them"
        )
    return result, {
        "handoff": {"source": str(subject.source), "weights": config.weights, "weights_blake2": config.weights_blake2},
        "data": {
            "path": str(dataset.path),
            "name": dataset.name,
            "split": dataset.split,
            "fingerprint": dataset.fingerprint,
            "classes": subject.classes.how,
            "within_level": levels is not None,
        },
        "precision": subject.precision,
        "batch_size": subject.batch_size,
        **report(result, recorder.gathered(control), dataset, subject.real),
        "speed": {
            "images_per_second": round(result.samples / seconds, 2),
            "seconds": round(seconds, 3),
            "ranks": rank.world_size,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        },
    }


def _tell_bad_sample(bad: BadSample) -> None:
    print(f"bad sample {bad.name} in {bad.shard}: {bad.reason}", file=sys.stderr)  # noqa: T201
