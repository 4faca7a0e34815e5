"""Draw the rooms, their modules and who imports whom: ``python docs/plot_house.py docs/pictures/house.png``.

What is drawn is read from the source and kept in the picture, where a test compares it with the source of today.
"""

import ast
import json
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {
    "slurm": "starts runs on a cluster and keeps them alive",
    "pretrain": "recipe, loop, checkpoints, evaluation, hand-off",
    "models": "the network and its losses",
    "data_pipeline": "from datasets to batches",
    "examples": "dense heads",
}
COLOURS = {
    "slurm": "#8a5fb0",
    "pretrain": "#2f6db5",
    "models": "#b5652f",
    "data_pipeline": "#2f8f6b",
    "examples": "#777777",
}
COLUMN, ROW, HEAD, GAP = 1.46, 0.205, 0.42, 0.16
"""Inches: a column of modules, a line of one, a box's heading, the space around a box."""
Corner = tuple[float, float]


def read_house() -> dict[str, Any]:
    """Modules by room, which of them are doors, and how often one room's modules import another's.

    Returns:
        ``modules`` by room, without the room's name; ``doors``, modules that are started with ``python -m`` or by the
        launcher; ``imports``, a number for each "room -> room"; ``wanted``, modules that another room imports.
    """
    modules: dict[str, list[str]] = {room: [] for room in ROOMS}
    doors, wanted, arrows = [], set(), set()
    for room in ROOMS:
        for file in sorted((ROOT / room).rglob("*.py")):
            source, name = file.read_text(), ".".join(file.relative_to(ROOT).with_suffix("").parts)
            name = name.removesuffix(".__main__")
            modules[room] += [] if file.stem.startswith("__") else [name.removeprefix(f"{room}.")]
            doors += [name] if "\nif __name__ ==" in source and "ArgumentParser" in source + _shared(room) else []
            for target in _imported(ast.parse(source)):
                if (there := target.split(".")[0]) in ROOMS and there != room:
                    arrows.add((room, there, name, target))
                    wanted.add(target)
    counts = Counter(f"{here} -> {there}" for here, there, *_ in arrows)
    return {"modules": modules, "doors": doors, "imports": dict(sorted(counts.items())), "wanted": sorted(wanted)}


def _shared(room: str) -> str:
    return "ArgumentParser" if room == "examples" else ""


def _imported(tree: ast.Module) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return found


def draw(house: dict[str, Any], picture: Path) -> None:
    """Draw it: who imports stands above, what is imported below."""
    figure, axes = plt.subplots(figsize=(15, 10.2))
    figure.subplots_adjust(0, 0, 1, 1)
    axes.set(xlim=(0, 15), ylim=(0, 10.2))
    axes.axis("off")
    boxes = {
        "slurm": _room(axes, house, "slurm", (2.6, 10.0), columns=5),
        "pretrain": _room(axes, house, "pretrain", (0.2, 8.1), columns=8),
        "models": _room(axes, house, "models", (0.2, 3.75), columns=3),
        "data_pipeline": _room(axes, house, "data_pipeline", (5.7, 3.75), columns=4),
        "examples": _room(axes, house, "examples", (12.9, 6.6), columns=1),
    }
    middle = {name: ((x0 + x1) / 2, (y0 + y1) / 2) for name, (x0, y0, x1, y1) in boxes.items()}
    for arrow, count in house["imports"].items():
        here, there = arrow.split(" -> ")
        (x0, y0, x1, _), (_, _, right, top) = boxes[here], boxes[there]
        if here != "examples":
            at = middle[here][0] if here == "slurm" else middle[there][0]
            _arrow(axes, [(at, y0), (at, top)], count, COLOURS[here])
        elif there == "pretrain":
            _arrow(axes, [(x0, middle[here][1]), (right, middle[here][1])], count, COLOURS[here])
        elif there == "data_pipeline":
            _arrow(axes, [(x0 + 0.4, y0), (x0 + 0.4, 2.2), (right, 2.2)], count, COLOURS[here])
        else:
            at = middle[there][0]
            _arrow(axes, [(x1 - 0.4, y0), (x1 - 0.4, 0.35), (at, 0.35), (at, boxes[there][1])], count, COLOURS[here])
    axes.text(12.2, 9.75, "arrows: imports between modules", fontsize=8, color="#444444")
    axes.text(12.2, 9.53, "bold: a door, started from outside", fontsize=8, fontweight="bold", color="#444444")
    axes.text(12.2, 9.31, "black: used by another room", fontsize=8, color="black")
    axes.text(12.2, 9.09, "gray: known in its own room only", fontsize=8, color="#777777")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=100, metadata={"house": json.dumps(house)})


def _room(axes: Axes, house: dict[str, Any], room: str, corner: Corner, columns: int) -> tuple[float, ...]:
    """A box with the modules of a room, its packages as boxes within; its left, lower, right and upper edge."""
    names = house["modules"][room]
    flat = [name for name in names if "." not in name]
    packages: dict[str, list[str]] = {}
    for name in names:
        if "." in name:
            packages.setdefault(name.split(".")[0], []).append(name)
    left, top = corner
    rows = -(-len(flat) // columns)
    inner = max((_rows_of(package) for package in packages.values()), default=0)
    height = HEAD + rows * ROW + (HEAD + inner * ROW + 2 * GAP if packages else GAP)
    right = left + columns * COLUMN + 2 * GAP
    _box(axes, (left, top - height), (right, top), COLOURS[room], "#fafafa")
    axes.text(left + GAP, top - 0.26, room, fontsize=13, fontweight="bold", color=COLOURS[room])
    if columns > 1:
        start = left + GAP + 0.135 * len(room) + 0.2
        axes.text(start, top - 0.26, ROOMS[room], fontsize=8.5, style="italic", color="#444444")
    _names(axes, house, [f"{room}.{name}" for name in flat], (left + GAP, top - HEAD), rows)
    edge = left + GAP
    for package, inside in packages.items():
        rows_inside = _rows_of(inside)
        wide = -(-len(inside) // rows_inside) * COLUMN + GAP
        upper = top - HEAD - rows * ROW - GAP / 2
        _box(axes, (edge, upper - HEAD - inner * ROW), (edge + wide, upper), COLOURS[room], "white")
        _name(axes, house, f"{room}.{package}", (edge + GAP / 2, upper - 0.22), heading=True)
        _names(axes, house, [f"{room}.{name}" for name in inside], (edge + GAP / 2, upper - 0.34), rows_inside)
        edge += wide + GAP
    return left, top - height, right, top


def _rows_of(package: list[str]) -> int:
    return 5 if len(package) > 8 else 2


def _names(axes: Axes, house: dict[str, Any], modules: list[str], corner: Corner, rows: int) -> None:
    for number, module in enumerate(modules):
        _name(axes, house, module, (corner[0] + number // rows * COLUMN, corner[1] - (number % rows + 0.6) * ROW))


def _name(axes: Axes, house: dict[str, Any], module: str, at: Corner, *, heading: bool = False) -> None:
    is_door, is_wanted = module in house["doors"], module in house["wanted"]
    axes.text(
        *at,
        module.rsplit(".", maxsplit=1)[-1],
        fontsize=9 if heading else 8,
        fontweight="bold" if is_door else "normal",
        style="italic" if heading and not is_door else "normal",
        color="black" if is_door or is_wanted or heading else "#777777",
    )


def _box(axes: Axes, lower: Corner, upper: Corner, edge: str, face: str) -> None:
    width, height = upper[0] - lower[0], upper[1] - lower[1]
    style = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch(lower, width, height, boxstyle=style, edgecolor=edge, facecolor=face, linewidth=1.4))


def _arrow(axes: Axes, corners: list[Corner], count: int, colour: str) -> None:
    width = 1 + count**0.5 / 3
    for start, end in pairwise(corners[:-1]):
        axes.plot(*zip(start, end, strict=True), color=colour, linewidth=width, solid_capstyle="round")
    axes.add_patch(
        FancyArrowPatch(*corners[-2:], arrowstyle="-|>", mutation_scale=16, linewidth=width, color=colour, shrinkA=0)
    )
    (x0, y0), (x1, y1) = corners[-2:]
    axes.text((x0 + x1) / 2, (y0 + y1) / 2, str(count), ha="center", va="center", fontsize=9, fontweight="bold",
              color=colour, bbox={"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": colour})  # fmt: skip


if __name__ == "__main__":
    draw(read_house(), Path(sys.argv[1]))
