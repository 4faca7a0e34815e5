"""Evaluate a hand-off: ``python -m pretrain.evaluate RUN_OR_HANDOFF --data DEST``.

On several processes: ``deepspeed --module pretrain.evaluate RUN_OR_HANDOFF --data DEST``; the answer is the same.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console

from data_pipeline.dataset import Dataset
from data_pipeline.errors import DataError
from data_pipeline.gpu_memory import gpu_memory_is_full
from pretrain.engine.distributed import Rank, choose_device, init_distributed, read_rank
from pretrain.evaluation.accuracy import Evaluation
from pretrain.evaluation.confusion_picture import MISSING, can_draw, draw_confusion
from pretrain.evaluation.of_handoff import DTYPES, Subject, examine, open_subject
from pretrain.evaluation.report import report_lines
from pretrain.files import write_atomically, write_json
from pretrain.handoff.folder import is_handoff
from pretrain.outcome import ExitCode, UserError
from pretrain.run_folder import RunFolder
from pretrain.summary import record_handoff_evaluation, summary_lines
from pretrain.survival.full_memory import tell_full_memory
from pretrain.survival.signals import StopFlag, first_speaks


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
    parser.add_argument("--batch-size", type=_count, help="per process; default: the recipe's evaluation.batch_size")
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


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"at least 1 is wanted, got {number}")
    return number


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
        subject = open_subject(
            folder.handoff if folder else options.target,
            options.data if "://" in options.data else Path(options.data),
            split=options.split,
            device=device,
            precision=options.precision,
            batch_size=options.batch_size,
            real=options.real,
            by_position=options.classes_by_position,
        )
        control = init_distributed(device) if rank.world_size > 1 else None
        if rank.is_first:
            for warning in subject.classes.warnings:
                print(f"WARNING {warning}", file=sys.stderr)  # noqa: T201
        result, content = examine(subject, rank, device, control)
        if rank.is_first:
            output = options.output or (folder.path / "evaluation" if folder else None)
            _tell(subject, result, content, output)
            if folder is not None and folder.summary.exists():
                _tell_run(folder, subject, content)
        if control is not None:
            dist.barrier(control)  # the launcher ends the others as soon as one is gone
            dist.destroy_process_group()
    except (UserError, DataError) as error:
        return _give_up(str(error), rank, started=subject is not None)
    except (RuntimeError, MemoryError) as error:
        if not gpu_memory_is_full(error):
            raise
        return _give_up(tell_full_memory(error, "evaluating", "lower --batch-size"), rank, started=True)
    return ExitCode.FINISHED


def _tell(subject: Subject, result: Evaluation, content: dict[str, Any], output: Path | None) -> None:
    console = Console(highlight=False, soft_wrap=True)
    dataset, speed = subject.dataset, content["speed"]
    lines = [f"hand-off {subject.source} on {dataset.path} {dataset.split}: {result}"]
    if content["data"]["within_level"]:
        lines.append("a label competes with the classes of its own level only, as in training with semantic softmax")
    lines += report_lines(content)
    lines.append(
        f"{content['samples']} images in {speed['seconds']:.1f} s, {speed['images_per_second']:.0f} images/s with "
        f"decoding: {speed['ranks']} x {speed['device']}, {subject.precision}"
    )
    console.print("\n".join(lines), markup=False)  # before anything can go wrong with the disk
    if output is not None:
        console.print("\n".join(_write(subject, content, output)), markup=False)


def _write(subject: Subject, content: dict[str, Any], output: Path) -> list[str]:
    """Write report and picture, and say so."""
    name = f"{subject.dataset.name}-{subject.dataset.split}"
    path, picture = output / f"{name}.json", output / f"{name}-confusion.png"
    try:
        output.mkdir(parents=True, exist_ok=True)
        picture.unlink(missing_ok=True)  # an older one would not belong to the report
        write_json(path, content)
        if not can_draw():
            return [f"report in {path}", f"WARNING {MISSING}"]
        title = f"{subject.config.recipe['name']} on {name}: worst classes, top-1 {content['top1']:.2f} %"
        write_atomically(picture, draw_confusion(content["per_class"], title))
    except OSError as error:
        raise UserError(f"the report cannot be written to {output}: {error}: make space, or name another") from None
    return [f"report in {path}", f"confusion of the worst classes in {picture}"]


def _tell_run(folder: RunFolder, subject: Subject, content: dict[str, Any]) -> None:
    """Show the run's summary; a result of the weights as handed off, on the training's own split, is noted there."""
    recipe = folder.read_recipe()
    assert recipe is not None
    dataset, train_split = subject.dataset, recipe["data"]["train_split"]
    if (
        subject.precision == "fp32"
        and dataset.split == recipe["data"]["val_split"]
        and train_split in dataset.store.manifest().splits
        and Dataset.open(dataset.path, train_split, subject.config.input.cache).fingerprint
        == folder.read_dataset()["fingerprint"]
    ):
        record_handoff_evaluation(folder, content["top1"])
    Console(highlight=False, soft_wrap=True).print("\n".join(summary_lines(folder)), markup=False)


def _first_speaks() -> bool:
    flag = StopFlag()
    flag.install_signal_handlers()
    return first_speaks(flag)


def _give_up(reason: str, rank: Rank | None, *, started: bool) -> int:
    """Say what is wrong; a rank among others ends without waiting for them, since they may wait for it."""
    alone = rank is None or rank.world_size == 1
    if started or rank is None or rank.local_rank == 0 or not _first_speaks():
        print(f"error: {reason}", file=sys.stderr, flush=True)  # noqa: T201
    if not alone:
        os._exit(ExitCode.WILL_FAIL_AGAIN)
    return ExitCode.WILL_FAIL_AGAIN


if __name__ == "__main__":
    sys.exit(main())
