"""A plan for a person: tables on a terminal, each number with what it rests on."""

from collections.abc import Callable

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from pretrain.planning.advice import limits
from pretrain.planning.estimate import Estimate, Outlook
from pretrain.planning.published import PUBLISHED, optimism
from pretrain.planning.scaling import Step
from pretrain.planning.speed import NOT_MEASURED

GIB = 2**30
WIDE, MEDIUM = 96, 92
"""Columns of a terminal: for the parts of memory, and for all columns of the other tables."""
SHORT = {
    "weights": "weights", "gradients": "grads", "optimizer": "optim.", "ema": "EMA", "activations": "activ.",
    "buffers": "buffers",
}  # fmt: skip


def show(estimate: Estimate, outlooks: tuple[Outlook, ...], console: Console) -> None:
    """Print the plan."""
    recipe, device = estimate.request.recipe, estimate.request.device
    console.print(Text(f"Plan of {recipe.name}: {recipe.model.name} on {estimate.batch.world_size} x {device.name}"))
    console.print()
    console.print(_facts(estimate))
    console.print()
    console.print(_memory(estimate, console.width))
    if outlooks:
        console.print()
        console.print(_failures(estimate, outlooks, console.width))
    if estimate.scaling:
        console.print()
        console.print(_scaling(estimate, console.width))
    console.print()
    what, lines = limits(estimate)
    console.print(_list(f"Limited by: {what}", lines or ["nothing to change was found"]))
    console.print()
    console.print(_list("What this rests on", assumptions(estimate)))


def assumptions(estimate: Estimate) -> list[str]:
    """What was not measured, in lines."""
    request = estimate.request
    memory = (
        f"Memory: tensors are counted, {NOT_MEASURED} on a GPU; {request.headroom:.0%} of "
        f"{request.device.memory / 1e9:.0f} GB (--headroom) is left for what is no tensor: CUDA context, NCCL, DALI, "
        "fragmentation. Kernels are a CPU's; a compiled network keeps less."
    )
    failures = (
        f"Failures: one in {request.mtbf_hours_per_gpu:,.0f} GPU-hours (--mtbf-hours-per-gpu; Llama 3 on 16,384 H100 "
        f"saw one in 50,700), {request.restart_minutes:g} minutes to be back (--restart-minutes), "
        f"{request.save_seconds:g} s of training lost to a checkpoint (--save-seconds): assumptions all three."
    )
    lines = [memory, failures]
    measured = estimate.speed.measured
    if request.benchmark is not None and measured is None:
        lines.append(f"--benchmark {request.benchmark}: was measured on another device, and is not used.")
    if measured is not None and measured.differs:
        lines.append(
            f"Speed: {NOT_MEASURED} as planned. The plan differs from what was measured: {', '.join(measured.differs)}."
        )
    if estimate.speed.believed is None:
        lines.append(
            f"Speed: {NOT_MEASURED} on this GPU. The bound is the peak of {request.device.name} over 6 FLOP for each "
            "MAC and image; no run reaches it. --benchmark FILE takes a measurement, --mfu 0.3 assumes a share of it."
        )
    elif measured is None:
        lines.append(f"Speed: {estimate.speed.rests_on} of the peak (--mfu), {NOT_MEASURED} on this GPU.")
    if estimate.scaling:
        least, most = optimism()
        lines.append(
            f"Scaling: all GPUs as fast as one, {request.gpus_per_node} in a node at "
            f"{request.device.link / 1e9:.0f} GB/s, {request.node_gbit:g} Gb/s between nodes (--node-gbit), 10 us a "
            f"hop, rings or trees; a micro-batch that shrinks is assumed to lose no speed. Simulated, {NOT_MEASURED}: "
            f"where talk hides behind the backward pass, {len(PUBLISHED)} published runs were {least:.0f} to "
            f"{most:.0f} points below it (docs/performance.md)."
        )
    return lines


def _facts(estimate: Estimate) -> Table:
    request, batch, data, how_fast = estimate.request, estimate.batch, estimate.data, estimate.speed
    gpus = batch.world_size
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_row("model", f"{estimate.parameters:,} parameters, {estimate.macs / 1e9:.2f} GMAC an image")
    table.add_row("data", f"{data.images:,} images, {data.classes:,} classes ({data.where_from})")
    table.add_row(
        "length",
        f"{request.recipe.schedule.epochs:g} epochs, {estimate.steps:,} steps, {estimate.images_seen:,.0f} images",
    )
    table.add_row(
        "batch", f"{batch.global_batch} = {gpus} GPUs x {batch.micro_batch} x {batch.accumulation} accumulated"
    )
    table.add_row("engine", f"ZeRO {estimate.stage}, {estimate.precision}")
    for number, note in enumerate(estimate.notes):
        table.add_row("" if number else "chosen", note)
    if how_fast.believed is None:
        table.add_row("time", f"{NOT_MEASURED}; at 100 % of the peak no less than {_time(estimate, how_fast.bound)}")
    else:
        table.add_row("time", f"{_time(estimate, how_fast.believed)} ({how_fast.rests_on})")
        if how_fast.measured:
            table.add_row("", f"{how_fast.measured.device}; {how_fast.measured.conditions}")
            if how_fast.measured.differs:
                table.add_row("", f"the plan differs: {', '.join(how_fast.measured.differs)}")
        table.add_row("", f"{how_fast.believed / how_fast.bound:.0%} of the peak; the rest of the loop is not in it")
    rate = how_fast.believed or how_fast.bound
    reading = rate * gpus * data.bytes_per_image
    unit = "" if how_fast.believed else "up to "
    given = "what storage gives is not known (--storage, --measure-storage)"
    if estimate.storage is not None:
        given = f"storage gives {estimate.storage / 1e9:.2f} GB/s ({estimate.storage_from})"
    table.add_row(
        "reading",
        f"{unit}{reading / 1e9:.2f} GB/s for {data.bytes_per_image / 1e3:.1f} kB an image; {given}",
    )
    table.add_row("checkpoints", _checkpoints(estimate))
    return table


def _time(estimate: Estimate, rate: float) -> str:
    hours, gpus = estimate.hours_at(rate), estimate.batch.world_size
    return f"{_duration(hours)}, {hours * gpus:,.1f} GPU-hours, {rate * gpus:,.0f} images/s, {rate:,.0f} a GPU"


def _checkpoints(estimate: Estimate) -> str:
    points = estimate.checkpoints
    keep = estimate.request.recipe.checkpoint.keep
    best = f"each {_duration(points.best / 3600)}"
    best += f" = {points.best_steps:,} steps" if points.best_steps else ""
    return (
        f"{points.bytes / 1e9:.2f} GB each, {keep} kept; saved each {points.every_steps:,} steps, Young-Daly says "
        f"{best} (a failure each {_duration(points.mtbf / 3600)})"
    )


def _memory(estimate: Estimate, width: int) -> RenderableType:
    device = estimate.request.device
    used = f"{estimate.capacity / GIB:.1f} GiB of {device.name} may be used"
    table = _table(f"Memory of one GPU at micro-batch {estimate.batch.micro_batch}, GiB; {used}")
    parts = SHORT if width >= WIDE else {}
    for name in ("ZeRO", "recomputed", "in"):
        table.add_column(name, no_wrap=True)
    for name in (*parts.values(), "sum", "fits up to"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    share = estimate.batch.global_batch // estimate.batch.world_size
    for before, row in zip((None, *estimate.rows), estimate.rows, strict=False):
        values = row.memory.parts()
        numbers = [f"{values[name] / GIB:.2f}" for name in parts]
        largest = f"{row.largest}" if row.largest < share - 1 else f"{row.largest} (all)"
        mark = "<- recipe" if row.chosen else "" if row.fits else "too much"
        new = before is None or before.stage != row.stage
        precision = row.precision.replace("bf16 autocast", "autocast") if new else ""
        total = f"{row.memory.total / GIB:.2f}"
        table.add_row(f"{row.stage}" if new else "", row.policy, precision, *numbers, total, largest, mark)
    return Group(table, *(Text(f" {line}") for line in estimate.refused))


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="", box=None, padding=(0, 1), header_style="")


def _failures(estimate: Estimate, outlooks: tuple[Outlook, ...], width: int) -> RenderableType:
    table = _table(f"Finish with failures, a failure each {_duration(estimate.checkpoints.mtbf / 3600)}")
    columns: list[tuple[str, Callable[[Outlook], str], bool]] = [
        ("each, steps", lambda one: f"{one.every_steps:,}", True),
        ("closed form", lambda one: _duration(one.expected), True),
        ("simulated", lambda one: _duration(one.simulated.mean / 3600), True),
        ("9 of 10 within", lambda one: _duration(one.simulated.high / 3600), False),
        ("failures", lambda one: f"{one.simulated.failures:.1f}", False),
    ]
    table.add_column("checkpoints", no_wrap=True)
    shown = [(name, cell) for name, cell, narrow in columns if narrow or width >= MEDIUM]
    for name, _ in shown:
        table.add_column(name, justify="right", no_wrap=True)
    for one in outlooks:
        table.add_row(one.what, *(cell(one) for _, cell in shown))
    return table


def _scaling(estimate: Estimate, width: int) -> RenderableType:
    total = estimate.batch.global_batch
    table = _table(f"The same global batch of {total} on other numbers of GPUs, on paper")
    columns: list[tuple[str, Callable[[Step], str], bool]] = [
        ("GPUs", lambda step: f"{step.gpus}", True),
        ("images each", lambda step: f"{step.images_per_gpu:.3g}", False),
        ("compute, ms", lambda step: f"{1e3 * step.compute:.1f}", False),
        ("talk, ms", lambda step: f"{1e3 * step.talk:.1f}", False),
        ("read, ms", lambda step: f"{1e3 * step.read:.1f}" if estimate.storage else "-", False),
        ("images/s", lambda step: f"{total / step.seconds:,.0f}", True),
        ("efficiency", lambda step: f"{step.efficiency:.0%}", True),
        ("run", lambda step: _duration(estimate.steps * step.seconds / 3600), True),
    ]
    shown = [(name, cell) for name, cell, narrow in columns if narrow or width >= MEDIUM]
    for name, _ in shown:
        table.add_column(name, justify="right", no_wrap=True)
    for step in estimate.scaling:
        table.add_row(*(cell(step) for _, cell in shown))
    return table


def _list(title: str, lines: list[str]) -> RenderableType:
    table = Table.grid(padding=(0, 1))
    for line in lines:
        table.add_row("-", Text(line))
    return Group(Text(title), table)


def _duration(hours: float) -> str:
    if hours >= 1000 * 24:
        return f"{hours / 24:,.0f} days"
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{60 * hours:.1f} min" if hours >= 1 / 60 else f"{3600 * hours:.1f} s"
