"""Evaluate a hand-off: ``python -m pretrain.evaluate RUN_OR_HANDOFF --data DEST``.

On several processes: ``deepspeed --module pretrain.evaluate RUN_OR_HANDOFF --data DEST``; the report is the same.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from pydantic import ValidationError

from data_pipeline.dataset import Dataset
from data_pipeline.errors import DataError, printable, without_secrets
from data_pipeline.gpu_memory import gpu_memory_is_full
from data_pipeline.loader import EvalLoader
from data_pipeline.transforms import InputConfig
from pretrain.arguments import add_device_argument, add_trust_argument
from pretrain.engine.distributed import Rank, choose_device, fail, init_distributed, read_rank
from pretrain.evaluation.accuracy import Evaluation, evaluate
from pretrain.evaluation.labels import ClassMatch, RealLabels, match_classes
from pretrain.evaluation.report import Recorder, draw_confusion, report, report_lines
from pretrain.fault_tolerance.preflight import meet
from pretrain.fields import explain
from pretrain.files import write_atomically, write_json
from pretrain.handoff.folder import HandoffConfig, is_handoff, load_handoff
from pretrain.outcome import ExitCode, UserError, exit_code, full_memory_message
from pretrain.recipe import validate_recipe
from pretrain.run_folder import RunFolder, record_handoff_evaluation, summary_lines

MEET_WITHIN_S = 600.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Subject:
    """A hand-off and the split that it is evaluated on, checked."""

    source: Path | str
    model: torch.nn.Module
    """In evaluation mode, on the device, in the precision that it computes in."""
    config: HandoffConfig
    input: InputConfig
    """How the dataset is read."""
    dataset: Dataset
    classes: ClassMatch
    real: RealLabels | None


def open_subject(options: argparse.Namespace, source: Path | str, rank: Rank, device: torch.device) -> Subject:
    """Load the hand-off at ``source``, open the data, and match their classes.

    Raises:
        UserError: the hand-off is damaged, its classes are not the data's, or ``--real`` belongs to other images.
        DataError: the dataset or the split does not exist or is damaged.
    """
    model, config = load_handoff(source, trust_factory=options.trust_factory)
    data = options.data if "://" in options.data else Path(options.data)
    settings = _settings(config, data, source)
    dataset = Dataset.open(data, options.split, settings.cache, check_files=rank.local_rank == 0)
    classes = match_classes(config, dataset, by_position=options.classes_by_position)
    real = None if options.real is None else RealLabels(options.real, dataset)
    return Subject(source, model.to(device, DTYPES[options.precision]), config, settings, dataset, classes, real)


def _settings(config: HandoffConfig, data: Path | str, source: Path | str) -> InputConfig:
    """The hand-off's input, and the two settings of its recipe's loader that matter for evaluation."""
    recipe = config.recipe.get("data")
    loader = recipe if isinstance(recipe, dict) else {}
    content = {"path": data, **config.input.model_dump()}
    content |= {name: loader[name] for name in ("cache", "max_bad_fraction") if name in loader}
    try:
        return InputConfig.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{source}: recipe.data: {explain(InputConfig, content, error)[0][1]}") from None


def examine(
    subject: Subject, options: argparse.Namespace, rank: Rank, device: torch.device, control: dist.ProcessGroup | None
) -> tuple[Evaluation, dict[str, Any]]:
    """Evaluate, and report as JSON; all but "speed" is equal for any number of ranks.

    Collective over ``control``, a CPU group of all ranks; None for a single process.

    Raises:
        UserError: a score is not a finite number, or the split is empty.
        DataError: too many samples are damaged.
    """
    config, dataset, columns, precision = subject.config, subject.dataset, subject.classes.columns, options.precision
    chosen = None if columns is None else torch.tensor(columns, device=device)
    levels = None if config.class_levels is None else torch.tensor(config.class_levels, device=device)
    if levels is not None and chosen is not None:
        levels = levels[chosen]

    def forward(images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = subject.model(images.to(DTYPES[precision]))
        return logits if chosen is None else logits[:, chosen]

    batch_size = options.batch_size or config.recipe.get("evaluation", {}).get("batch_size") or 64
    loader = EvalLoader(
        dataset,
        subject.input,
        batch_size=batch_size,
        rank=rank.rank,
        world_size=rank.world_size,
        local_ranks=rank.local_world_size,
        device=device,
        on_bad_sample=lambda bad: _print(f"bad sample {bad.name} in {bad.shard}: {bad.reason}", sys.stderr),
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
            f"{subject.source}: the scores of {result.not_finite} of {result.samples} images are not finite: "
            f"the weights are broken, or {precision} overflows"
        )
    return result, {
        "handoff": {"source": str(subject.source), "weights": config.weights, "weights_blake2": config.weights_blake2},
        "data": {
            "path": without_secrets(str(dataset.path)),
            "name": dataset.name,
            "split": dataset.split,
            "fingerprint": dataset.fingerprint,
            "classes": subject.classes.how,
            "within_level": levels is not None,
        },
        "precision": precision,
        "batch_size": batch_size,
        **report(result, recorder.gathered(control), dataset, subject.real),
        "speed": {
            "images_per_second": round(result.samples / seconds, 2),
            "seconds": round(seconds, 3),
            "ranks": rank.world_size,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        },
    }


def _print(text: str, stream: TextIO | None = None) -> None:
    """Print a line, whose names come from data."""
    print(printable(without_secrets(text)), file=stream)


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
    add_device_argument(parser)
    parser.add_argument("--batch-size", type=_count, help="per process; default: the recipe's evaluation.batch_size")
    parser.add_argument(
        "--precision",
        choices=DTYPES,
        default="fp32",
        help="of the computation; default: fp32, the precision of the hand-off",
    )
    parser.add_argument("--real", type=Path, metavar="FILE", help="several labels per image: ImageNet-ReaL's real.json")
    parser.add_argument(
        "--classes-by-position", action="store_true", help="match classes by index, whatever their ids and names"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="of the report; default: RUN/evaluation for a run, else none"
    )
    add_trust_argument(parser)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the launcher
    return parser.parse_args(arguments)


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def main(arguments: list[str] | None = None) -> int:
    """Evaluate a hand-off on a split: top-1, top-5, loss, each class, calibration, confusion, images/s."""
    options = parse_arguments(arguments)
    rank: Rank | None = None
    subject: Subject | None = None
    try:
        rank = read_rank()
        device = choose_device(rank, options.device)
        target = Path(options.target)
        is_run = (target / "recipe.yaml").exists() and not is_handoff(target)
        folder = RunFolder(target) if is_run else None
        subject = open_subject(options, folder.handoff if folder else options.target, rank, device)
        control = None
        if rank.world_size > 1:
            meet(rank, MEET_WITHIN_S)
            control = init_distributed(device)
        if rank.is_first:
            for warning in subject.classes.warnings:
                _print(f"WARNING {warning}", sys.stderr)
        result, content = examine(subject, options, rank, device, control)
        if rank.is_first:
            output = options.output or (folder.path / "evaluation" if folder else None)
            _print_report(subject, result, content)  # first, since writing may fail
            if output is not None:
                _write_report(subject, content, output)
            if folder is not None and folder.summary.exists():
                try:
                    _print_summary(folder, subject, content)
                except UserError as error:  # the result itself is printed and written
                    print(f"WARNING the run's summary has no evaluation of the hand-off: {error}", file=sys.stderr)  # noqa: T201
        if control is not None:
            dist.barrier(control)  # the launcher kills the other ranks when one exits
            dist.destroy_process_group()
    except (UserError, DataError) as error:
        return fail(str(error), rank, started=subject is not None, code=exit_code(error))
    except (RuntimeError, MemoryError) as error:
        if not gpu_memory_is_full(error):
            raise
        return fail(
            full_memory_message(error, "evaluating", "lower --batch-size"),
            rank,
            started=True,
            code=ExitCode.WILL_FAIL_AGAIN,
        )
    return ExitCode.FINISHED


def _print_report(subject: Subject, result: Evaluation, content: dict[str, Any]) -> None:
    dataset, speed = subject.dataset, content["speed"]
    _print(f"hand-off {subject.source} on {dataset.path} {dataset.split}: {result}")
    if content["data"]["within_level"]:
        _print("a label competes with the classes of its own level only, as in semantic softmax training")
    for line in report_lines(content):
        _print(line)
    _print(
        f"{content['samples']} images in {speed['seconds']:.1f} s, {speed['images_per_second']:.0f} images/s with "
        f"decoding: {speed['ranks']} x {speed['device']}, {content['precision']}"
    )


def _write_report(subject: Subject, content: dict[str, Any], output: Path) -> None:
    name = f"{subject.dataset.name}-{subject.dataset.split}"
    path, plot = output / f"{name}.json", output / f"{name}-confusion.png"
    can_draw = find_spec("matplotlib") is not None
    try:
        output.mkdir(parents=True, exist_ok=True)
        plot.unlink(missing_ok=True)  # that of an older report
        write_json(path, content)
        if can_draw:
            title = f"{subject.config.recipe['name']} on {name}: worst classes, top-1 {content['top1']:.2f} %"
            write_atomically(plot, draw_confusion(content["per_class"], title))
    except OSError as error:
        raise UserError(
            f"the report cannot be written to {output}: {error}: free some space, or give another --output"
        ) from None
    _print(f"report in {path}")
    if can_draw:
        _print(f"confusion matrix of the worst classes in {plot}")
    else:
        install = "pip install --constraint constraints.txt matplotlib"
        _print(f"WARNING the confusion matrix plot is left out: matplotlib is not installed ({install})")


def _print_summary(folder: RunFolder, subject: Subject, content: dict[str, Any]) -> None:
    """Print the run's summary, and record top-1 there if it is of fp32 weights on the run's validation split."""
    recipe = validate_recipe(folder.read_recipe() or {}, where=str(folder.path / "recipe.yaml"))
    dataset, train_split = subject.dataset, recipe.data.train_split
    if (
        content["precision"] == "fp32"
        and dataset.split == recipe.data.val_split
        and train_split in dataset.store.manifest().splits
        and Dataset.open(dataset.path, train_split, subject.input.cache, check_files=False).fingerprint
        == folder.read_dataset()["fingerprint"]
    ):
        record_handoff_evaluation(folder, content["top1"])
    for line in summary_lines(folder):
        _print(line)


if __name__ == "__main__":
    sys.exit(main())
