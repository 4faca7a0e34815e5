"""Evaluate a hand-off: ``python -m pretrain.evaluate RUN_OR_HANDOFF --data DEST``.

On several processes: ``deepspeed --module pretrain.evaluate RUN_OR_HANDOFF --data DEST``; the report is the same.
"""

import argparse
import sys
import time
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
from pretrain.evaluation.accuracy import evaluate
from pretrain.evaluation.classes import match_classes
from pretrain.evaluation.real_labels import RealLabels
from pretrain.evaluation.report import draw_confusion, report, report_lines
from pretrain.fault_tolerance.preflight import meet
from pretrain.fields import explain
from pretrain.files import write_atomically, write_json
from pretrain.handoff.folder import HandoffConfig, is_handoff, load_handoff
from pretrain.outcome import ExitCode, UserError, exit_code, full_memory_message
from pretrain.run_folder import RunFolder, record_handoff_evaluation, summary_lines

MEET_WITHIN_S = 600.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def evaluate_handoff(
    source: Path | str, options: argparse.Namespace, rank: Rank, device: torch.device
) -> dict[str, Any]:
    """Load a hand-off and a dataset, match their classes, evaluate, and report as JSON. Collective.

    All of the report but "speed" is equal for any number of ranks.

    Raises:
        UserError: the hand-off is damaged, its classes are not the data's, ``--real`` belongs to other images, a score
            is not a finite number, or the split is empty.
        DataError: the dataset or the split does not exist or is damaged, or too many samples are.
    """
    network, config = load_handoff(source, trust_factory=options.trust_factory)
    settings = _input_of(config, options.data, source)
    dataset = Dataset.open(settings.path, options.split, settings.cache, check_files=rank.local_rank == 0)
    classes, precision = match_classes(config, dataset, by_position=options.classes_by_position), options.precision
    real = None if options.real is None else RealLabels(options.real, dataset)
    network.to(device, DTYPES[precision])
    columns = None if classes.columns is None else torch.tensor(classes.columns, device=device)
    levels = None if config.class_levels is None else torch.tensor(config.class_levels, device=device)
    if levels is not None and columns is not None:
        levels = levels[columns]

    def forward(images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = network(images.to(DTYPES[precision]))
        return logits if columns is None else logits[:, columns]

    if rank.world_size > 1:
        meet(rank, MEET_WITHIN_S)
        init_distributed(device)
    for warning in classes.warnings if rank.is_first else ():
        _print(f"WARNING {warning}", sys.stderr)
    batch_size = options.batch_size or config.recipe.get("evaluation", {}).get("batch_size") or 64
    loader = EvalLoader(
        dataset,
        settings,
        batch_size=batch_size,
        rank=rank.rank,
        world_size=rank.world_size,
        local_ranks=rank.local_world_size,
        device=device,
        on_bad_sample=lambda bad: _print(f"bad sample {bad.name} in {bad.shard}: {bad.reason}", sys.stderr),
    )
    began = time.monotonic()
    try:
        verdicts = evaluate(forward, loader, levels=levels, number_of=real.number if real else None)
    finally:
        loader.close()
    assert verdicts is not None
    seconds, result = time.monotonic() - began, verdicts.total()
    if result.not_finite:
        raise UserError(
            f"{source}: the scores of {result.not_finite} of {result.samples} images are not finite: the weights are "
            f"broken, or {precision} overflows"
        )
    if rank.is_first:
        _print(f"hand-off {source} on {dataset.path} {dataset.split}: {result}")
    return {
        "handoff": {"source": str(source), "weights": config.weights, "weights_blake2": config.weights_blake2},
        "data": {
            "path": without_secrets(str(dataset.path)),
            "name": dataset.name,
            "split": dataset.split,
            "fingerprint": dataset.fingerprint,
            "classes": classes.how,
            "within_level": levels is not None,
        },
        "precision": precision,
        "batch_size": batch_size,
        **report(verdicts, dataset, real),
        "speed": {
            "images_per_second": round(result.samples / seconds, 2),
            "seconds": round(seconds, 3),
            "ranks": rank.world_size,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        },
    }


def _input_of(config: HandoffConfig, data: str, source: Path | str) -> InputConfig:
    """The hand-off's input, and the two settings of its recipe's loader that matter for evaluation."""
    recipe = config.recipe.get("data")
    loader = recipe if isinstance(recipe, dict) else {}
    content = {"path": data if "://" in data else Path(data), **config.input.model_dump()}
    content |= {name: loader[name] for name in ("cache", "max_bad_fraction") if name in loader}
    try:
        return InputConfig.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{source}: recipe.data: {explain(InputConfig, content, error)[0][1]}") from None


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
    """Evaluate a hand-off on a split: top-1, top-5, loss, each class and its confusions, calibration, images/s."""
    options = parse_arguments(arguments)
    rank: Rank | None = None
    try:
        rank = read_rank()
        device = choose_device(rank, options.device)
        target = Path(options.target)
        is_run = (target / "recipe.yaml").exists() and not is_handoff(target)
        content = evaluate_handoff(target / "handoff" if is_run else options.target, options, rank, device)
        if rank.is_first:
            _print_and_write(content, options.output or (target / "evaluation" if is_run else None))
            if is_run and RunFolder(target).summary.exists():
                _print_summary(RunFolder(target), content)
        if dist.is_initialized():
            dist.barrier()  # the launcher kills the other ranks when one exits
            dist.destroy_process_group()
    except (UserError, DataError) as error:
        return fail(str(error), rank, started=dist.is_initialized(), code=exit_code(error))
    except (RuntimeError, MemoryError) as error:
        if not gpu_memory_is_full(error):
            raise
        text = full_memory_message(error, "evaluating", "lower --batch-size")
        return fail(text, rank, started=True, code=ExitCode.WILL_FAIL_AGAIN)
    return ExitCode.FINISHED


def _print_and_write(content: dict[str, Any], output: Path | None) -> None:
    data, speed = content["data"], content["speed"]
    if data["within_level"]:
        _print("a label competes with the classes of its own level only, as in semantic softmax training")
    for line in report_lines(content):
        _print(line)
    _print(
        f"{content['samples']} images in {speed['seconds']:.1f} s, {speed['images_per_second']:.0f} images/s with "
        f"decoding: {speed['ranks']} x {speed['device']}, {content['precision']}"
    )
    if output is not None:
        name = f"{data['name']}-{data['split']}"
        path, plot = output / f"{name}.json", output / f"{name}-confusion.png"
        can_draw = find_spec("matplotlib") is not None
        try:
            output.mkdir(parents=True, exist_ok=True)
            plot.unlink(missing_ok=True)  # that of an older report
            write_json(path, content)
            if can_draw:
                title = f"{name}: worst classes, top-1 {content['top1']:.2f} %"
                write_atomically(plot, draw_confusion(content["per_class"], title))
        except OSError as error:
            raise UserError(
                f"the report cannot be written to {output}: {error}: free some space, or give another --output"
            ) from None
        _print(f"report in {path}")
        if can_draw:
            _print(f"confusions of the worst classes in {plot}")
        else:
            install = "pip install --constraint constraints.txt matplotlib"
            _print(f"WARNING the plot of the worst classes is left out: matplotlib is not installed ({install})")


def _print_summary(folder: RunFolder, content: dict[str, Any]) -> None:
    """Print the run's summary, and record top-1 there if it is of fp32 weights on the run's validation split."""
    state = folder.read_state()
    split = None if state is None else state.fingerprints.get("val")
    if content["precision"] == "fp32" and content["data"]["fingerprint"] == split:
        try:
            record_handoff_evaluation(folder, content["top1"])
        except UserError as error:  # the result itself is printed and written
            _print(f"WARNING the run's summary has no evaluation of the hand-off: {error}", sys.stderr)
    for line in summary_lines(folder):
        _print(line)


if __name__ == "__main__":
    sys.exit(main())
