"""Estimate memory and time of a run: ``python -m pretrain.plan --recipe recipes/demo.yaml --gpus 32``."""

import argparse
import copy
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from data_pipeline.dataset import Dataset
from data_pipeline.errors import DataError, without_secrets
from pretrain.arguments import add_run_arguments
from pretrain.check import checkpoint_bytes
from pretrain.devices import DEVICES, FLOPS_PER_MAC
from pretrain.engine.deepspeed_config import input_dtype, read_deepspeed_config, resolve_for
from pretrain.engine.schedule import Schedule
from pretrain.factory import NetworkConfig, architecture, build_network, count_parameters, on_meta, try_network
from pretrain.memory_estimate import PREFIXES, Engine, MemoryEstimate, Policy, as_booleans
from pretrain.outcome import ExitCode, UserError, exit_code
from pretrain.recipe import Recipe, load_recipe
from pretrain.time_estimate import communicated_bytes, read_benchmark

DESCRIPTION = """\
Estimate what a run needs before it starts: steps, memory, time, checkpoints. No GPU is needed. What is neither counted
nor measured is an option, and is printed as an assumption.

  python -m pretrain.plan --recipe recipes/demo.yaml --gpus 32
  python -m pretrain.plan --recipe recipes/demo.yaml --gpus 8 --gpu a100 --mfu 0.3
"""
BYTES_PER_IMAGE = 115_000
"""Assumed where the dataset is not there: ImageNet-1k's training archive has 147.9 GB for 1,281,167 images."""


def _number(kind: Callable[[str], float], below: float = math.inf) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = kind(text)
        if not 0 < value < below:
            raise argparse.ArgumentTypeError(f"{text} is not between 0 and {below:g}")
        return value

    return number


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.plan", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    count, number, share = _number(int), _number(float), _number(float, below=1)
    add_run_arguments(parser.add_argument_group("the run (as for pretrain/main.py)"))
    add = parser.add_argument_group("where it runs").add_argument
    add("--gpus", type=count, required=True, help="number of GPUs")
    add("--gpu", choices=DEVICES, default="h100", help="default: h100")
    add("--gpus-per-node", type=count, default=8, help="default: 8")
    add("--node-gbit", type=number, default=400.0, help="network of a node, Gb/s one way (default: 400, an assumption)")
    add("--headroom", type=share, default=0.1, help="share of memory that is not tensors (default: 0.1, assumed)")
    add = parser.add_argument_group("data, where the dataset is not there").add_argument
    add("--images", type=count, help="number of images in the training split")
    add("--classes", type=count, help="number of classes")
    add = parser.add_argument_group("time").add_argument
    add("--benchmark", type=Path, metavar="FILE", help="result of python -m benchmarks.model on this kind of GPU")
    add("--mfu", type=share, help="assume this share of the GPU's peak where nothing was measured")
    add(
        "--mtbf-hours-per-gpu", type=number, default=50_000.0, help="mean time between failures (default: 5e4, assumed)"
    )
    add("--save-seconds", type=number, default=1.0, help="seconds a checkpoint delays training (default: 1, assumed)")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    return parser.parse_args(arguments)


def make_plan(options: argparse.Namespace) -> dict[str, Any]:
    """Work everything out; takes some seconds. Bytes and seconds, unless a key has another unit.

    Raises:
        UserError: what is wrong, in one line.
    """
    recipe, device, gpus = load_recipe(options.recipe, options.assignments), DEVICES[options.gpu], options.gpus
    data = without_secrets(_data(recipe, options))
    config = architecture(recipe, data["classes"])
    parameters, macs = count_parameters(config), try_network(build_network(config), config, torch.device("cpu"))
    deepspeed = read_deepspeed_config(options.deepspeed_config, recipe.deepspeed)
    of_gpus = {"world_size": gpus, "has_gpu": True, "has_bf16_gpu": True}
    resolved = resolve_for(recipe, deepspeed, **of_gpus)
    batch, capacity = resolved.batch, device.memory * (1 - options.headroom)
    measured = options.benchmark and read_benchmark(options.benchmark, device, config, recipe, resolved)
    rows, refused, policies = list[dict[str, Any]](), list[str](), _policies(recipe, config)
    for stage in range(4):
        changed = copy.deepcopy(deepspeed)
        changed.setdefault("zero_optimization", {})["stage"] = stage
        try:
            at_stage = resolve_for(recipe, changed, **of_gpus)
        except UserError as error:
            refused.append(f"ZeRO {stage}: {error}")
            continue
        estimate = MemoryEstimate(recipe, at_stage, config, gpu=True, loader_batches=recipe.data.prefetch)
        rows += _rows(estimate, recipe, policies, capacity, chosen=stage == resolved.stage)
    dtype = torch.bfloat16 if resolved.precision == "bf16 autocast" else input_dtype(resolved.precision)
    peak = device.peak(dtype) / (FLOPS_PER_MAC * macs)
    rate = measured["images_per_s"] if measured else options.mfu and options.mfu * peak
    schedule = Schedule(recipe, data["images"], batch.global_batch)
    steps = schedule.total_steps
    link = device.link if gpus <= options.gpus_per_node else min(device.link, options.node_gbit * 1e9 / 8)
    communication = communicated_bytes(Engine(recipe, resolved), parameters) / link
    compute = rate and batch.global_batch / gpus / rate
    step, mtbf = compute and compute + communication, 3600 * options.mtbf_hours_per_gpu / gpus
    interval = math.sqrt(2 * options.save_seconds * mtbf)  # Young (1974), the first order of Daly (2006)
    return {
        "name": recipe.name, "model": recipe.model.title, "gpu": device.name, "parameters": parameters, "macs": macs,
        "data": data, "epochs": recipe.schedule.epochs, "steps": steps, "batch": dataclasses.asdict(batch),
        "stage": resolved.stage, "precision": resolved.precision, "notes": resolved.notes,
        "capacity": capacity, "memory": rows, "refused": refused, "measured": measured,
        "images_per_s_per_gpu": rate, "images_per_s_per_gpu_at_peak": peak, "compute": compute,
        "communication": communication, "step": step, "hours": step and steps * step / 3600,
        "hours_at_peak": steps * batch.global_batch / gpus / peak / 3600,
        "checkpoint_bytes": checkpoint_bytes(recipe, parameters), "every_steps": schedule.checkpoint_every,
        "mtbf": mtbf, "best_interval": interval, "best_steps": step and max(1, round(interval / step)),
        "assumptions": [*_assumptions(options, measured)],
    }  # fmt: skip


def _data(recipe: Recipe, options: argparse.Namespace) -> dict[str, Any]:
    images, classes, size, source = options.images, options.classes, BYTES_PER_IMAGE, "given; bytes per image assumed"
    if not (images and classes):
        try:
            split = Dataset.open(recipe.data.path, recipe.data.train_split, recipe.data.cache)
        except DataError as error:
            without = "or plan without it: --images N --classes N"
            raise UserError(f"{error}; {without}", exit_code(error)) from None
        images, classes, source = images or len(split), classes or split.num_classes, str(recipe.data.path)
        size = round(sum(shard.tar.bytes for shard in split.shards) / len(split))
    return {"images": images, "classes": classes, "bytes_per_image": size, "source": source}


def _policies(recipe: Recipe, config: NetworkConfig) -> dict[str, Policy]:
    """What can be recomputed, by name, and what the recipe says."""
    policies, own = dict(PREFIXES), recipe.model.activation_checkpointing
    if not hasattr(on_meta(config), "set_activation_checkpointing"):
        names = ("none", "all") if hasattr(on_meta(config), "set_grad_checkpointing") else ("none",)
        policies = {name: PREFIXES[name] for name in names}
    if as_booleans(own) not in map(as_booleans, policies.values()):
        policies["the recipe's"] = own
    return policies


def _rows(
    estimate: MemoryEstimate, recipe: Recipe, policies: dict[str, Policy], capacity: float, *, chosen: bool
) -> Iterator[dict[str, Any]]:
    """Memory at every recomputation policy, at the ZeRO stage of the estimate, which is ``chosen`` or not."""
    own = as_booleans(recipe.model.activation_checkpointing)
    for name, policy in policies.items():
        memory = estimate.memory(policy)
        yield {
            "zero_stage": estimate.engine.stage, "recomputed": name, "precision": estimate.precision,
            **dataclasses.asdict(memory), "total": memory.total, "fits": memory.total <= capacity,
            "largest_micro_batch": estimate.largest_micro_batch(policy, capacity),
            "chosen": chosen and as_booleans(policy) == own,
        }  # fmt: skip


def _assumptions(options: argparse.Namespace, measured: dict[str, Any] | None) -> Iterator[str]:
    """What was not measured."""
    device = DEVICES[options.gpu]
    yield (
        f"Memory: tensors are counted, not measured on a GPU. {options.headroom:.0%} of {device.memory / 1e9:.0f} GB "
        "(--headroom) is left for CUDA context, NCCL, DALI, fragmentation. Operators are those of a CPU."
    )
    yield (
        f"Communication: {device.link / 1e9:.0f} GB/s between the {options.gpus_per_node} GPUs of a node, "
        f"{options.node_gbit:g} Gb/s between nodes (--node-gbit), rings, nothing hidden behind computing."
    )
    yield (
        f"Failures: one in {options.mtbf_hours_per_gpu:,.0f} GPU-hours (--mtbf-hours-per-gpu; Llama 3 on 16,384 H100: "
        f"one in 50,700), {options.save_seconds:g} s of training lost to a checkpoint (--save-seconds)."
    )
    yield "Offloading (offload_optimizer, offload_param) is not counted: what it moves to the host is shown on the GPU."
    if measured:
        yield "Speed: that of the benchmark's micro-batch; recomputing activations takes up to a third more time."
    elif options.mfu:
        yield f"Speed: ASSUMED, an MFU of {options.mfu:.0%} (--mfu), not measured on this GPU."
    else:
        yield "Speed: not measured on this GPU. No run reaches the peak. Give --benchmark FILE, or assume --mfu."


def show(plan: dict[str, Any], console: Console) -> None:
    """Print a plan as tables."""
    batch, data, gib = plan["batch"], plan["data"], 2**30
    cut = f"{batch['world_size']} GPUs x micro-batch {batch['micro_batch']} x {batch['accumulation']} accumulated"
    best = f"{_duration(plan['best_interval'])}{' = {best_steps:,} steps'.format(**plan) if plan['step'] else ''}"
    saved = f"{plan['checkpoint_bytes'] / 1e9:.2f} GB each, every {plan['every_steps']:,} steps"
    table = Table.grid(padding=(0, 2))
    for name, *lines in (
        ("model", f"{plan['model']}, {plan['parameters']:,} parameters, {plan['macs'] / 1e9:.2f} GMAC per image"),
        ("data", f"{data['images']:,} images, {data['classes']:,} classes ({data['source']})"),
        ("length", f"{plan['epochs']:g} epochs, {plan['steps']:,} steps"),
        ("batch", f"{batch['global_batch']} = {cut}"),
        ("engine", f"ZeRO {plan['stage']}, {plan['precision']}", *plan["notes"]),
        ("time", *_time(plan)),
        ("checkpoints", saved, f"Young/Daly: every {best}, with a failure every {_duration(plan['mtbf'])}"),
    ):
        table.add_row(name, Text("\n".join(lines)))
    console.print(f"Plan of {plan['name']} on {batch['world_size']} x {plan['gpu']}", "", table, sep="\n")
    title = f"\nGiB of one GPU at micro-batch {batch['micro_batch']}; {plan['capacity'] / gib:.1f} may be used"
    numbers = (Column(name, justify="right") for name in ("total", "fits up to"))
    table = Table("ZeRO", "recomputed", "in", *numbers, "", title=title, title_justify="left", box=None)
    for row in plan["memory"]:
        mark = "<- recipe" * row["chosen"] + " too much" * (not row["fits"])
        total, largest = f"{row['total'] / gib:.2f}", str(row["largest_micro_batch"])
        table.add_row(str(row["zero_stage"]), row["recomputed"], row["precision"], total, largest, mark)
    console.print(table, *map(Text, plan["refused"]), sep="\n")
    console.print("\nAssumptions", *map(Text, plan["assumptions"]), sep="\n- ")


def _time(plan: dict[str, Any]) -> list[str]:
    measured, rate, step = plan["measured"], plan["images_per_s_per_gpu"], plan["step"]
    if not rate:
        return [f"not measured; at 100 % of the peak no less than {_duration(3600 * plan['hours_at_peak'])}"]
    source = "measured: {file}; {device}; {conditions}".format(**measured) if measured else "ASSUMED"
    reading = plan["batch"]["global_batch"] * plan["data"]["bytes_per_image"] / step
    compute = f"compute {1e3 * plan['compute']:.1f} ms + communication {1e3 * plan['communication']:.1f} ms per step"
    return [
        f"{_duration(3600 * plan['hours'])}, {plan['hours'] * plan['batch']['world_size']:,.1f} GPU-hours",
        f"{rate:,.0f} images/s per GPU, {rate / plan['images_per_s_per_gpu_at_peak']:.0%} of the peak ({source})",
        f"{compute}, efficiency {plan['compute'] / step:.0%}; reading {reading / 1e9:.2f} GB/s",
    ]


def _duration(seconds: float) -> str:
    for unit, length, from_ in (("days", 86400, 2 * 86400), ("h", 3600, 3600), ("min", 60, 60)):
        if seconds >= from_:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.1f} s"


def main(arguments: list[str] | None = None) -> int:
    """Print a plan."""
    # DeepSpeed checks its own sections; on a machine without GPUs it prints a warning unless this is set.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        options = parse_arguments(arguments)
        plan = make_plan(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return error.code
    if options.json:
        print(json.dumps(plan, indent=2))  # noqa: T201
    else:
        show(plan, Console(highlight=False))
    return ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(main())
