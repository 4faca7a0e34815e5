"""Evaluate a hand-off: ``python -m pretrain.evaluate RUN_OR_HANDOFF --data DEST``.

On several processes: ``deepspeed --module pretrain.evaluate RUN_OR_HANDOFF --data DEST``; the answer is the same.
"""

import argparse
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from data_pipeline.dataset import Dataset
from data_pipeline.errors import DataError
from data_pipeline.loader import BadSample, EvalLoader
from models import LaViT
from pretrain.class_match import ClassMatch, match_classes
from pretrain.confusion_picture import MISSING, can_draw, draw_confusion
from pretrain.distributed import Rank, choose_device, init_distributed, read_rank
from pretrain.evaluation import evaluate
from pretrain.evaluation_report import Recorder, report, report_lines
from pretrain.files import write_json
from pretrain.handoff import HandoffConfig, is_handoff, load_handoff
from pretrain.outcome import ExitCode, UserError
from pretrain.real_labels import RealLabels
from pretrain.run_folder import RunFolder
from pretrain.summary import record_handoff_evaluation, summary_lines

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


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.evaluate", description=main.__doc__)
    parser.add_argument(
        "target",
        metavar="RUN_OR_HANDOFF",
        help="runs/NAME, a hand-off folder, or ORGANIZATION/NAME[@REVISION] of the Hugging Face Hub",
    )
    parser.add_argument("--data", required=True, help="folder of the dataset, or its URL")
    parser.add_argument("--split", default="val", help="default: val")
    parser.add_argument("--batch-size", type=int, help="per process; default: the recipe's evaluation.batch_size")
    parser.add_argument(
        "--precision", choices=DTYPES, default="fp32", help="what the model computes in; default: fp32, as handed off"
    )
    parser.add_argument(
        "--real", type=Path, metavar="FILE", help="several labels per picture, as ImageNet-ReaL's real.json"
    )
    parser.add_argument(
        "--classes-by-position", action="store_true", help="take classes as they stand, however they are called"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="for the report; default: RUN/evaluation for a run, else none"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the launcher, which also sets it
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Evaluate a hand-off on a split: top-1, top-5, loss, each class, calibration, confusion, images/s."""
    options = parse_arguments(arguments)
    rank: Rank | None = None
    subject: Subject | None = None
    try:
        rank = read_rank()
        device = choose_device(rank)
        folder = None
        if (Path(options.target) / "recipe.yaml").exists() and not is_handoff(Path(options.target)):
            folder = RunFolder(Path(options.target))
        subject = open_subject(folder.handoff if folder else options.target, options, device)
        control = init_distributed(device) if rank.world_size > 1 else None
        if rank.is_first:
            for warning in subject.classes.warnings:
                print(f"WARNING {warning}", file=sys.stderr)  # noqa: T201
        content = examine(subject, rank, device, control)
        if rank.is_first:
            output = options.output or (folder.path / "evaluation" if folder else None)
            _tell(subject, content, output)
            if folder is not None and folder.summary.exists():
                _tell_run(folder, subject, content)
        if control is not None:
            dist.barrier(control)  # the launcher ends the others as soon as one is gone
            dist.destroy_process_group()
    except (UserError, DataError) as error:
        return _give_up(error, rank, started=subject is not None)
    return ExitCode.FINISHED


def open_subject(source: Path | str, options: argparse.Namespace, device: torch.device) -> Subject:
    """Load the hand-off as anyone would, open the data, and see that they fit.

    Raises:
        UserError: the hand-off is damaged, its classes are not the data's, or the file of labels is about other pictures.
        DataError: the dataset or the split does not exist or is damaged.
    """
    model, config = load_handoff(source)
    data = options.data if "://" in options.data else Path(options.data)
    dataset = Dataset.open(data, options.split, config.input.cache)
    classes = match_classes(config, dataset, by_position=options.classes_by_position)
    size = options.batch_size or config.recipe.get("evaluation", {}).get("batch_size") or 64
    if size < 1:
        raise UserError(f"--batch-size: at least 1 is wanted, got {size}")
    return Subject(
        source=source,
        model=model.to(device, DTYPES[options.precision]),
        config=config,
        dataset=dataset,
        classes=classes,
        real=None if options.real is None else RealLabels(options.real, dataset),
        batch_size=size,
        precision=options.precision,
    )


def examine(
    subject: Subject, rank: Rank, device: torch.device, control: dist.ProcessGroup | None = None
) -> dict[str, Any]:
    """Evaluate and report, as JSON; all but "speed" is equal for any number of ranks. Collective.

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
    return {
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
        "evaluation": str(result),
        "speed": {
            "images_per_second": round(result.samples / seconds, 2),
            "seconds": round(seconds, 3),
            "ranks": rank.world_size,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        },
    }


def _tell(subject: Subject, content: dict[str, Any], output: Path | None) -> None:
    console = Console(highlight=False, soft_wrap=True)
    dataset, speed = subject.dataset, content["speed"]
    lines = [f"hand-off {subject.source} on {dataset.path} {dataset.split}: {content['evaluation']}"]
    if content["data"]["within_level"]:
        lines.append("a label competes with the classes of its own level only, as in training with semantic softmax")
    lines += report_lines(content)
    lines.append(
        f"{content['samples']} images in {speed['seconds']:.1f} s, {speed['images_per_second']:.0f} images/s with "
        f"decoding: {speed['ranks']} ranks, {speed['device']}, {subject.precision}"
    )
    if output is not None:
        lines += _write(subject, content, output)
    console.print("\n".join(lines), markup=False)


def _write(subject: Subject, content: dict[str, Any], output: Path) -> list[str]:
    """Write report and picture, and say so."""
    name = f"{subject.dataset.name}-{subject.dataset.split}"
    path, picture = output / f"{name}.json", output / f"{name}-confusion.png"
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_json(path, content)
        if not can_draw():
            return [f"report in {path}", f"WARNING {MISSING}"]
        title = f"{subject.config.recipe['name']} on {name}: worst classes, top-1 {content['top1']:.2f} %"
        draw_confusion(content["per_class"], picture, title)
    except OSError as error:
        raise UserError(f"the report cannot be written to {output}: {error}: make space, or name another") from None
    return [f"report in {path}", f"confusion of the worst classes in {picture}"]


def _tell_run(folder: RunFolder, subject: Subject, content: dict[str, Any]) -> None:
    """Note the result in the run's summary, if this is the split that training evaluated on, and show it."""
    recipe = folder.read_recipe()
    assert recipe is not None
    dataset = subject.dataset
    if dataset.split == recipe["data"]["val_split"] and (
        Dataset.open(dataset.path, recipe["data"]["train_split"], subject.config.input.cache).fingerprint
        == folder.read_dataset()["fingerprint"]
    ):
        record_handoff_evaluation(folder, content["top1"])
    Console(highlight=False, soft_wrap=True).print("\n".join(summary_lines(folder)), markup=False)


def _tell_bad_sample(bad: BadSample) -> None:
    print(f"bad sample {bad.name} in {bad.shard}: {bad.reason}", file=sys.stderr)  # noqa: T201


def _give_up(error: Exception, rank: Rank | None, *, started: bool) -> int:
    """Say what is wrong; a rank among others ends at once, since they may wait for it."""
    alone = rank is None or rank.world_size == 1
    if started or rank is None or rank.local_rank == 0:  # while opening, all ranks meet the same error
        print(f"error: {error}", file=sys.stderr, flush=True)  # noqa: T201
    if not alone:
        os._exit(ExitCode.WILL_FAIL_AGAIN)
    return ExitCode.WILL_FAIL_AGAIN


if __name__ == "__main__":
    sys.exit(main())
