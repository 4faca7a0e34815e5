"""The picture of docs/performance.md: what was measured side by side, as bars with their quartiles."""

import hashlib
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import tables
from benchmarks.report import quartiles

mpl.use("agg")
OURS, OTHERS = "tab:blue", "lightsteelblue"
Section = dict[str, Any]
Bars = list[tuple[str, tuple[float, float, float], bool]]
"""Name, (lower quartile, median, upper quartile), whether it is ours."""


def panels(newest: dict[str, list[Section]]) -> list[tuple[str, Bars]]:
    """Titles and bars, of the first machine that each kind was measured on."""
    found: list[tuple[str, Bars]] = []
    for kind, make in (("alternatives", _model), ("model", _model), ("data", _data), ("trainer", _trainer),
                       ("end_to_end", _whole)):  # fmt: skip
        if newest[kind] and not (kind == "model" and newest["alternatives"]):
            section = newest[kind][0]
            title, bars = make(section)
            found.append((f"{title}\n{section['machine']['name']}, {section['when'][:10]}", bars))
    return found


def _model(section: Section) -> tuple[str, Bars]:
    batch = section["conditions"]["batch"]
    bars = [
        (f"{row['model'].split('_patch')[0]}, {row['mode']}", quartiles([batch / value for value in row["training_s"]]),
         tables.is_lavit(row["model"]))
        for row in tables.faster_modes(section)
    ]  # fmt: skip
    clock = "second" if section["machine"]["device"] == "cuda" else "second of one core"
    return f"network, each in its faster mode: training images per {clock}", bars


def _data(section: Section) -> tuple[str, Bars]:
    measure = "images_per_s" if section["machine"]["device"] == "cuda" else "images_per_cpu_s"
    bars = [(row["contestant"], quartiles(row[measure]), row["contestant"] == "ours") for row in section["rows"]]
    return f"input: images per {'second' if measure == 'images_per_s' else 'CPU-second'}", bars


def _trainer(section: Section) -> tuple[str, Bars]:
    mode = section["rows"][-1]["mode"]
    bars = []
    for row in section["rows"]:
        if row["mode"] == mode:
            speed = tables.ratio(tables.bare_of(section, row)["step_s"], row["step_s"])
            weights = ", weights in bf16" if row.get("precision") == "bf16" else ""
            name = row["variant"].replace("stage", "ZeRO stage") + weights
            bars.append((name, speed, row["variant"] != tables.BARE))
    return f"trainer, {mode}: speed over a bare DDP loop", bars


def _whole(section: Section) -> tuple[str, Bars]:
    case = tables.cases(section)[0]
    modes = [mode for mode in (*tables.MODES, tables.ALTERNATIVE) if mode in case]
    bars = [(mode, quartiles(case[mode]), mode == "both") for mode in modes]
    return f"end to end, {case['model']} at {case['size']}: images per second", bars


def digest(newest: dict[str, list[Section]]) -> str:
    """Of all that is drawn: the picture holds it, so that one can tell whether it is of these results."""
    return hashlib.sha256(json.dumps(panels(newest)).encode()).hexdigest()


def draw(newest: dict[str, list[Section]], picture: Path) -> None:
    """Draw what there is; a panel for each kind that was measured."""
    drawn = panels(newest)
    figure = Figure(figsize=(11, 1.0 + 2.6 * ((len(drawn) + 1) // 2)), layout="constrained")
    for number, (title, bars) in enumerate(drawn):
        _bars(figure.add_subplot((len(drawn) + 1) // 2, 2, number + 1), title, bars)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110, metadata={"Comment": digest(newest), "Software": None})


def _bars(axes: Axes, title: str, bars: Bars) -> None:
    names, values, ours = zip(*bars, strict=True)
    places = range(len(bars))
    middles = [middle for _, middle, _ in values]
    spread = [[middle - low for low, middle, _ in values], [high - middle for _, middle, high in values]]
    axes.barh(places, middles, xerr=spread, color=[OURS if one else OTHERS for one in ours],
              error_kw={"ecolor": "dimgray", "capsize": 3})  # fmt: skip
    for place, (_, middle, high) in zip(places, values, strict=True):
        axes.annotate(tables.number(middle, 3), (max(middle, high), place), xytext=(4, 0), textcoords="offset points",
                      va="center", fontsize=8)  # fmt: skip
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=9, loc="left")
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlim(0, 1.15 * max(high for *_, high in values))
    axes.spines[["top", "right"]].set_visible(False)
