"""Tables of what was measured: medians, quartiles in brackets, and ratios within the rounds.

Contestants of a section took turns, so the n-th measurements of two of them were made under the same conditions: a
ratio is the median over the rounds of the ratios of that round. Every function takes a section as ``benchmarks.report``
writes it and returns the lines of a table.
"""

from collections.abc import Iterable
from typing import Any

import torch

from benchmarks.report import quartiles
from pretrain.devices import peak_flops
from pretrain.monitoring.efficiency import model_flops_per_image
from pretrain.planning.speed import WITH_KERNEL

BARE = "bare DDP"
MODES = ("synthetic", "data only", "both")
INPUT = {"images_per_cpu_s": "images per CPU-second", "images_per_s": "images/s"}
"""Measures of the input, and their titles."""
ALTERNATIVE = "DDP + webdataset + Pillow"
"""What is measured end to end beside ``MODES``; sections before 2026-11-28 lack it."""
NOT_MEASURED = "not measured"
Section = dict[str, Any]
Row = dict[str, Any]


def ratio(over: list[float], under: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of the ratios within the rounds."""
    return quartiles([a / b for a, b in zip(over, under, strict=True)])


def head(titles: list[str]) -> list[str]:
    """The first two lines of a table."""
    return [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]


def model(section: Section) -> list[str]:
    """Images/s of every network and its speed relative to ``lavit_SIZE``; MFU where the device's peak is known."""
    batch, precision = section["conditions"]["batch"], section["conditions"]["precision"]
    titles = ["model", "mode", "parameters", "MACs", "forward, images/s", "training, images/s"]
    lines = head([*titles, "LaViT's training speed over its", "MFU", "peak memory, GiB"])
    for row in section["rows"]:
        forward, training = (batch / quartiles(row[label])[1] for label in ("forward_s", "training_s"))
        used = mfu(training, row["macs"], section, precision)
        peak = row["peak_gib"]
        lines.append(
            f"| {row['model']} | {row['mode']} | {row['parameters'] / 1e6:.2f} M | {row['macs'] / 1e9:.2f} G "
            f"| {number(forward)} | {number(training)} | {times(training_ratio(section, row))} "
            f"| {NOT_MEASURED if used is None else f'{used:.1%}'} | {NOT_MEASURED if peak is None else f'{peak:.2f}'} |"
        )
    return lines


def training_ratio(section: Section, row: Row) -> tuple[float, float, float] | None:
    """How many times as fast as a network ``lavit_SIZE`` trains, the one measured before it; None for that itself."""
    mine = section["rows"].index(row)
    ours = [
        other for other in section["rows"][: mine + 1] if is_lavit(other["model"]) and other["mode"] == row["mode"]
    ][-1]
    return None if ours is row else ratio(row["training_s"], ours["training_s"])


def faster_modes(section: Section) -> list[Row]:
    """Of every network the row of the mode in which it trains faster."""
    best: dict[str, Row] = {}
    for row in section["rows"]:
        other = best.setdefault(row["model"], row)
        if quartiles(row["training_s"])[1] < quartiles(other["training_s"])[1]:
            best[row["model"]] = row
    return list(best.values())


def in_faster_modes(section: Section) -> str:
    """The same ratios once more, each network in the mode that is better for it, in a sentence."""
    ours, *others = faster_modes(section)
    told = (f"{row['model']} ({row['mode']}) {times(ratio(row['training_s'], ours['training_s']))}" for row in others)
    return f"Each in the mode in which it trains faster, {ours['model']} ({ours['mode']}) over: {', '.join(told)}."


def is_lavit(name: str) -> bool:
    """Whether it is a network with Less Attention, as it comes."""
    return name.startswith("lavit_") and not name.endswith(("_vanilla", WITH_KERNEL))


def mfu(images_per_s: float, macs: int, section: Section, precision: str, devices: int = 1) -> float | None:
    """Share of the devices' peak that the products of a training step use; None where the peak is not known."""
    if section["machine"]["device"] != "cuda":
        return None
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    peak = peak_flops(section["machine"]["name"], dtype)
    return None if peak is None else images_per_s * model_flops_per_image(macs) / (devices * peak)


def data(section: Section) -> list[str]:
    """Images per CPU-second and per second, and how many times as many ours are."""
    lines = head(["", *INPUT.values(), *(f"ours over it, {of}" for of in ("per CPU-second", "images/s"))])
    ours = section["rows"][0]
    for row in section["rows"]:
        more = [None if row is ours else ratio(ours[name], row[name]) for name in INPUT]
        lines.append(_input_line([row["contestant"]], row, more))
    return lines


def input_settings(section: Section) -> list[str]:
    """Images per CPU-second and per second of each setting, and how many times as many as with the defaults."""
    default = section["rows"][0]
    named = list(default["settings"])
    lines = head([*named, *INPUT.values(), *(f"over the default, {of}" for of in ("per CPU-second", "images/s"))])
    for row in section["rows"]:
        more = [None if row is default else ratio(row[name], default[name]) for name in INPUT]
        lines.append(_input_line([_setting(row["settings"][name]) for name in named], row, more))
    return lines


def _input_line(what: list[str], row: Row, more: list[tuple[float, float, float] | None]) -> str:
    cells = [*what, *(spread(row[name]) for name in INPUT), *(times(one) for one in more)]
    return f"| {' | '.join(cells)} |"


def _setting(value: Any) -> str:
    """A setting's value; sides of a picture have a cross between them."""
    return " x ".join(map(str, value)) if isinstance(value, list | tuple) else f"{value:,}"


def trainer(section: Section) -> list[str]:
    """Time of a step, images/s of all ranks, and the time over that of the bare loop of the same mode."""
    lines = head(["variant", "mode", "precision", "step, ms", "images/s", "time over bare DDP"])
    pictures = section["conditions"]["micro_batch"] * section["conditions"]["ranks"]
    for row in section["rows"]:
        slower = None if row["variant"] == BARE else ratio(row["step_s"], bare_of(section, row)["step_s"])
        lines.append(
            f"| {row['variant']} | {row['mode']} | {row.get('precision') or section['conditions']['precision']} "
            f"| {spread([1e3 * value for value in row['step_s']])} "
            f"| {number(pictures / quartiles(row['step_s'])[1])} | {times(slower)} |"
        )
    return lines


def bare_of(section: Section, row: Row) -> Row:
    """The bare loop that a row is compared with; sections before 2026-11-28 have one precision, and rows name none."""
    return find(section["rows"], variant=BARE, mode=row["mode"], precision=row.get("precision"))


def end_to_end(section: Section) -> list[str]:
    """The three modes of every case, both together over what limits, and over what people would use instead."""
    bound = "the slower of the two" if section["machine"]["device"] == "cuda" else "the slower / harmonic bound"
    titles = ["case", "precision", "synthetic, images/s", "data only", "both", f"both over {bound}"]
    lines = head([*titles, "limited by", "MFU", f"{ALTERNATIVE}, images/s", f"ours over {ALTERNATIVE}"])
    for case in cases(section):
        synthetic, alone, both = (case[mode] for mode in MODES)
        limit = "the data" if quartiles(alone)[1] < quartiles(synthetic)[1] else "the network"
        share = percent(over_slower(case))
        if section["machine"]["device"] == "cpu":
            share += f" / {percent(over_harmonic(case))}"
        used = mfu(quartiles(both)[1], case["macs"], section, case["precision"], section["conditions"]["ranks"])
        lines.append(
            f"| {name_of(case)} | {case['precision']} | {spread(synthetic)} | {spread(alone)} | {spread(both)} "
            f"| {share} | {limit} | {NOT_MEASURED if used is None else f'{used:.1%}'} | {rival(case)} |"
        )
    return lines


def cases(section: Section) -> list[Row]:
    """Of an end-to-end section, with the images per second of each mode by its name."""
    found: dict[str, Row] = {}
    for row in section["rows"]:
        found.setdefault(name_of(row), dict(row))[row["mode"]] = row["images_per_s"]
    return list(found.values())


def name_of(case: Row) -> str:
    """A case in words."""
    return f"{case['model']}, {case['size']} pixels, {case['micro_batch']} a rank"


def over_slower(case: Row) -> tuple[float, float, float]:
    """Both together over the slower of synthetic and data only."""
    synthetic, alone, both = (case[mode] for mode in MODES)
    return ratio(both, [min(pair) for pair in zip(synthetic, alone, strict=True)])


def over_harmonic(case: Row) -> tuple[float, float, float]:
    """Both together over 1 / (1 / synthetic + 1 / data only): what one pool of cores can do of both."""
    synthetic, alone, both = (case[mode] for mode in MODES)
    return ratio(both, [1 / (1 / a + 1 / b) for a, b in zip(synthetic, alone, strict=True)])


def rival(case: Row) -> str:
    """Images/s of what people would use instead, and both together over it: two cells."""
    if ALTERNATIVE not in case:
        return f"{NOT_MEASURED} | "
    return f"{spread(case[ALTERNATIVE])} | {times(ratio(case[MODES[2]], case[ALTERNATIVE]))}"


def find(rows: Iterable[Row], **facts: object) -> Row:
    """The row with these facts.

    Raises:
        LookupError: there is none.
    """
    for row in rows:
        if all(row.get(name) == value for name, value in facts.items()):
            return row
    raise LookupError(f"no row has {facts}")


def spread(values: list[float]) -> str:
    """Median, and quartiles in brackets."""
    low, middle, high = quartiles(values)
    return f"{number(middle)} ({number(low)} to {number(high)})"


def number(value: float, digits: int = 4) -> str:
    """With so many digits, and all those before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def times(found: tuple[float, float, float] | None) -> str:
    """A ratio with its quartiles."""
    return "" if found is None else f"{found[1]:.3f} ({found[0]:.3f} to {found[2]:.3f})"


def percent(found: tuple[float, float, float]) -> str:
    """A share with its quartiles."""
    return f"{found[1]:.1%} ({found[0]:.1%} to {found[2]:.1%})"
