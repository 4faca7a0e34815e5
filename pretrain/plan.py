"""The door to planning: ``python -m pretrain.plan --recipe recipes/demo.yaml --gpus 32``."""

import argparse
import dataclasses
import difflib
import json
import math
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from pretrain.arguments import add_run_arguments
from pretrain.devices import DEVICES
from pretrain.engine.deepspeed_config import read_deepspeed_config
from pretrain.outcome import ExitCode, UserError
from pretrain.planning.advice import limits
from pretrain.planning.estimate import Estimate, Outlook, Request, make_estimate, with_failures
from pretrain.planning.report import assumptions, show
from pretrain.recipe import load_recipe

DESCRIPTION = """\
Say what a run will need and cost before it starts: steps, memory, time, checkpoints, data; what limits it and what to
change. No GPU is needed. Nothing is guessed in silence: what was not measured is said to be, or is an option.

  python -m pretrain.plan --recipe recipes/demo.yaml --gpus 32
  python -m pretrain.plan --recipe recipes/demo.yaml --gpus 8 --gpu a100 --mfu 0.3 --simulate-failures
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        UserError: it does not make sense.
    """
    parser = _Parser(
        prog="python -m pretrain.plan", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    run = parser.add_argument_group("the run (as for pretrain/main.py)")
    add_run_arguments(run)
    where = parser.add_argument_group("where it runs")
    where.add_argument("--gpus", type=int, required=True, help="how many")
    where.add_argument("--gpu", default="h100", help=f"which: {', '.join(DEVICES)} (default: h100)")
    where.add_argument("--gpus-per-node", type=int, default=8, help="default: 8")
    where.add_argument("--node-gbit", type=float, default=400.0, metavar="GBIT",
                       help="network of a node, Gb/s one way (default: 400, an assumption)")  # fmt: skip
    where.add_argument("--headroom", type=float, default=0.1, metavar="SHARE",
                       help="of a GPU's memory, kept for what is no tensor (default: 0.1, an assumption)")  # fmt: skip
    data = parser.add_argument_group("data, where the dataset is not there")
    data.add_argument("--images", type=int, help="of the training split")
    data.add_argument("--classes", type=int)
    data.add_argument("--bytes-per-image", type=float, help="on disk")
    fast = parser.add_argument_group("how fast")
    fast.add_argument("--benchmark", type=Path, metavar="FILE",
                      help="result of python -m benchmarks on this kind of GPU")  # fmt: skip
    fast.add_argument("--mfu", type=float, help="assume this share of the peak where nothing was measured")
    fast.add_argument("--storage", type=float, metavar="GB/S", help="what storage gives all GPUs together")
    fast.add_argument("--measure-storage", action="store_true", help="read shards for some seconds to see")
    fail = parser.add_argument_group("failures")
    fail.add_argument("--simulate-failures", action="store_true", help="play the run through with failures")
    fail.add_argument("--mtbf-hours-per-gpu", type=float, default=50_000.0, metavar="HOURS",
                      help="mean time between failures of a GPU and its part of a node (default: 5e4)")  # fmt: skip
    fail.add_argument("--restart-minutes", type=float, default=10.0, metavar="MINUTES",
                      help="from a failure to the next step (default: 10, an assumption)")  # fmt: skip
    fail.add_argument("--save-seconds", type=float, default=1.0, metavar="SECONDS",
                      help="what a checkpoint takes from training (default: 1, an assumption)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the plan for programs")
    options = parser.parse_args(arguments)
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    if options.gpu not in DEVICES:
        near = difflib.get_close_matches(options.gpu.lower(), DEVICES, n=1, cutoff=0.4)
        raise UserError(
            f"--gpu {options.gpu}: its peaks are not known here" + (f" (did you mean {near[0]}?)" if near else "")
            + f"; there are: {', '.join(DEVICES)}"
        )  # fmt: skip
    least = {"gpus": 1, "gpus_per_node": 1, "images": 1, "classes": 1}
    for name, value in least.items():
        given = getattr(options, name)
        if given is not None and given < value:
            raise UserError(f"--{name.replace('_', '-')} {given}: must be at least {value}")
    for name in ("bytes_per_image", "mfu", "storage", "mtbf_hours_per_gpu", "node_gbit"):
        given = getattr(options, name)
        if given is not None and not given > 0:
            raise UserError(f"--{name.replace('_', '-')} {given:g}: must be positive")
    for name in ("restart_minutes", "save_seconds"):
        if not 0 <= getattr(options, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name):g}: must not be negative")
    if options.mfu is not None and options.mfu > 1:
        raise UserError(f"--mfu {options.mfu:g}: it is a share of the peak, between 0 and 1")
    if not 0 <= options.headroom < 1:
        raise UserError(f"--headroom {options.headroom:g}: it is a share of the memory, from 0 to below 1")
    if options.storage is not None and options.measure_storage:
        raise UserError("--storage says what --measure-storage would find out: give one of them")


def plan(options: argparse.Namespace) -> tuple[Estimate, tuple[Outlook, ...]]:
    """Make the plan.

    Raises:
        UserError: what is wrong, in one line.
    """
    recipe = load_recipe(options.recipe, options.assignments)
    fields = {field.name for field in dataclasses.fields(Request)} - {"recipe", "deepspeed", "device", "storage"}
    request = Request(
        recipe=recipe,
        deepspeed=read_deepspeed_config(options.deepspeed_config, recipe.deepspeed),
        device=DEVICES[options.gpu],
        storage=None if options.storage is None else 1e9 * options.storage,
        **{name: getattr(options, name) for name in fields},
    )
    estimate = make_estimate(request)
    return estimate, with_failures(estimate) if request.simulate_failures else ()


def as_json(estimate: Estimate, outlooks: tuple[Outlook, ...]) -> str:
    """The plan as one JSON object; bytes, seconds and hours as the fields of ``Estimate`` say."""
    content: dict[str, Any] = {
        field.name: getattr(estimate, field.name)
        for field in dataclasses.fields(estimate)
        if field.name not in {"request", "rows"}
    }
    content["gpu"] = estimate.request.device
    content["memory"] = [
        {
            "zero_stage": row.stage, "recomputed": row.policy, "precision": row.precision, **row.memory.parts(),
            "total": row.memory.total, "host": row.memory.host, "peak_in": row.memory.peak.phase, "fits": row.fits,
            "largest_micro_batch": row.largest, "chosen": row.chosen,
        }
        for row in estimate.rows
    ]  # fmt: skip
    rate = estimate.speed.believed
    content["hours"] = None if rate is None else estimate.hours_at(rate)
    content["least_hours"] = estimate.hours_at(estimate.speed.bound)
    content["failures"] = outlooks
    content["limited_by"], content["change"] = limits(estimate)
    content["assumptions"] = assumptions(estimate)
    return json.dumps(content, indent=2, default=dataclasses.asdict)


def main(arguments: list[str] | None = None) -> int:
    """Print a plan."""
    # DeepSpeed checks its own sections; on a machine without GPUs it says so on the output unless it is told first.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        options = parse_arguments(arguments)
        estimate, outlooks = plan(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return ExitCode.WILL_FAIL_AGAIN
    if options.json:
        print(as_json(estimate, outlooks))  # noqa: T201
    else:
        show(estimate, outlooks, Console(highlight=False))
    return ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(main())
