"""What was aimed at, and what was measured: the first table of docs/performance.md."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks import tables
from benchmarks.tables import NOT_MEASURED, find

Section = dict[str, Any]
Found = tuple[float, float, float]
"""Lower quartile, median, upper quartile."""


@dataclass(frozen=True)
class Goal:
    """A number to reach on a kind of device; without ``least`` it only has to be stated."""

    device: str
    what: str
    kind: str
    """Of the section that has it."""
    look: Callable[[Section], Found | None]
    """None where the section lacks it."""
    least: float | None = None
    say: Callable[[Found], str] = tables.times


def _faster(than: str, mode: str) -> Callable[[Section], Found]:
    """How many times as fast as another network LaViT-S trains."""

    def look(section: Section) -> Found:
        ours, other = (find(section["rows"], model=name, mode=mode) for name in ("lavit_small", than))
        return tables.ratio(other["training_s"], ours["training_s"])

    return look


def _trainer(variant: str, mode: str) -> Callable[[Section], Found]:
    """Speed of the trainer over that of the bare loop."""

    def look(section: Section) -> Found:
        row = find(section["rows"], variant=variant, mode=mode)
        return tables.ratio(tables.bare_of(section, row)["step_s"], row["step_s"])

    return look


def _data(measure: str, than: str | None = None) -> Callable[[Section], Found]:
    """Speed of the input, or how many times as much it does as another."""

    def look(section: Section) -> Found:
        ours = find(section["rows"], contestant="ours")[measure]
        if than is None:
            return tables.quartiles(ours)
        return tables.ratio(ours, find(section["rows"], contestant=than)[measure])

    return look


def _mfu(section: Section) -> Found | None:
    row = find(section["rows"], model="lavit_small", mode="compiled")
    batch = section["conditions"]["batch"]
    low, middle, high = (
        tables.mfu(batch / seconds, row["macs"], section, section["conditions"]["precision"])
        for seconds in reversed(tables.quartiles(row["training_s"]))
    )
    return None if low is None or middle is None or high is None else (low, middle, high)


def _whole(over: Callable[[dict[str, Any]], Found], case: int = 0) -> Callable[[Section], Found]:
    return lambda section: over(tables.cases(section)[case])


def _over_alternative(case: dict[str, Any]) -> Found:
    return tables.ratio(case["both"], case[tables.ALTERNATIVE])


def _over_synthetic(case: dict[str, Any]) -> Found:
    return tables.ratio(case["both"], case["synthetic"])


def _plain(found: Found) -> str:
    low, middle, high = map(tables.number, found)
    return f"{middle} ({low} to {high})"


GOALS = (
    Goal("cpu", "LaViT-S trains as fast as its vanilla twin, eager", "model",
         _faster("lavit_small_vanilla", "eager"), 1.0),
    Goal("cpu", "the same, compiled", "model", _faster("lavit_small_vanilla", "compiled"), 1.0),
    Goal("cpu", "the whole trainer, ZeRO 0 (the default there), beside a bare DDP loop", "trainer",
         _trainer("stage 0", "eager"), 0.97),
    Goal("cpu", "the same, ZeRO 1", "trainer", _trainer("stage 1", "eager"), 0.97),
    Goal("cpu", "input beside webdataset + Pillow, per CPU-second", "data",
         _data("images_per_cpu_s", "webdataset + Pillow"), 2.0),
    Goal("cpu", "end to end over the slower of synthetic and data only, an ordinary network", "end_to_end",
         _whole(tables.over_slower, 1), 0.95, tables.percent),
    Goal("cpu", "the same, a network as hungry as decoding is fast, on the same cores", "end_to_end",
         _whole(tables.over_slower), 0.95, tables.percent),
    Goal("cpu", "that whole beside a DDP loop fed by webdataset + Pillow", "end_to_end", _whole(_over_alternative)),
    Goal("cuda", "LaViT-S in bf16, compiled, beside pvt_v2_b2", "alternatives", _faster("pvt_v2_b2", "compiled"), 1.2),
    Goal("cuda", "the same beside swin_tiny", "alternatives",
         _faster("swin_tiny_patch4_window7_224", "compiled"), 1.2),
    Goal("cuda", "MFU of LaViT-S, compiled", "model", _mfu, say=tables.percent),
    Goal("cuda", "decoding on the GPU, images/s", "data", _data("images_per_s"), say=_plain),
    Goal("cuda", "end to end over the slower of synthetic and data only", "end_to_end", _whole(tables.over_slower),
         0.95, tables.percent),
    Goal("cuda", "end to end over synthetic", "end_to_end", _whole(_over_synthetic), 0.95, tables.percent),
    Goal("cuda", "end to end beside a DDP loop fed by webdataset + Pillow", "end_to_end", _whole(_over_alternative)),
)  # fmt: skip


def table(newest: dict[str, list[Section]]) -> list[str]:
    """Every goal beside what the newest section of its kind has on its kind of device."""
    lines = ["| on a | goal | at least | measured | reached |", "|---|---|---|---|---|"]
    for goal in GOALS:
        asked = "stated" if goal.least is None else f"{goal.least:.0%}" if goal.say is tables.percent else goal.least
        found = look(goal, newest)
        reached = "" if found is None or goal.least is None else verdict(found, goal.least)
        what = NOT_MEASURED if found is None else goal.say(found)
        lines.append(f"| {'GPU' if goal.device == 'cuda' else 'CPU'} | {goal.what} | {asked} | {what} | {reached} |")
    return lines


def verdict(found: Found, least: float) -> str:
    """Whether the median reaches it, and whether the quartiles say otherwise."""
    sure = found[0] >= least or found[2] < least
    return ("yes" if found[1] >= least else "no") + ("" if sure else ", within the spread")


def look(goal: Goal, newest: dict[str, list[Section]]) -> Found | None:
    """What was measured towards a goal; None: nothing."""
    for section in newest[goal.kind]:
        if section["machine"]["device"] == goal.device:
            try:
                return goal.look(section)
            except LookupError:
                continue
    return None
