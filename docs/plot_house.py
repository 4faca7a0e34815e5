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
COLUMNS = {"slurm": 5, "pretrain": 8, "models": 3, "data_pipeline": 4, "examples": 1}
LINES = 6
"""A package with more modules gets another column."""
LEGEND: dict[str, dict[str, str]] = {
    "arrows: imports between modules": {"color": "#444444"},
    "bold: a door, started from outside": {"color": "black", "fontweight": "bold"},
    "black: used by another room": {"color": "black"},
    "gray: known in its own room only": {"color": "#777777"},
}
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
            doors += [name] if "\nif __name__ ==" in source else []
            for target in _imported(ast.parse(source)):
                if (there := target.split(".")[0]) in ROOMS and there != room:
                    arrows.add((room, there, name, target))
                    wanted.add(target)
    counts = Counter(f"{here} -> {there}" for here, there, *_ in arrows)
    return {"modules": modules, "doors": doors, "imports": dict(sorted(counts.items())), "wanted": sorted(wanted)}


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
    heights = {room: _height(house["modules"][room], columns) for room, columns in COLUMNS.items()}
    lower = max(heights["models"], heights["data_pipeline"]) + 0.8
    middle, upper = lower + 0.75 + heights["pretrain"], lower + 1.4 + heights["pretrain"] + heights["slurm"]
    figure, axes = plt.subplots(figsize=(15, upper + 0.2))
    figure.subplots_adjust(0, 0, 1, 1)
    axes.set(xlim=(0, 15), ylim=(0, upper + 0.2))
    axes.axis("off")
    corners = {"slurm": (2.6, upper), "pretrain": (0.2, middle), "models": (0.2, lower), "data_pipeline": (5.7, lower),
               "examples": (12.9, lower + 1.2 + heights["examples"])}  # fmt: skip
    boxes = {room: _room(axes, house, room, corner, heights[room]) for room, corner in corners.items()}
    for arrow, count in house["imports"].items():
        here, there = arrow.split(" -> ")
        (x0, y0, x1, y1), (left, low, right, top) = boxes[here], boxes[there]
        if here != "examples":
            at = (x0 + x1) / 2 if here == "slurm" else (left + right) / 2
            path = [(at, y0), (at, top)]
        elif there == "pretrain":
            path = [(x0, (y0 + y1) / 2), (right, (y0 + y1) / 2)]
        elif there == "data_pipeline":
            path = [(x0 + 0.4, y0), (x0 + 0.4, (low + top) / 2), (right, (low + top) / 2)]
        else:
            path = [(x1 - 0.4, y0), (x1 - 0.4, 0.35), ((left + right) / 2, 0.35), ((left + right) / 2, low)]
        _arrow(axes, path, count, COLOURS[here])
    for number, (text, style) in enumerate(LEGEND.items()):
        axes.text(12.2, upper - 0.25 - 0.22 * number, text, fontsize=8, **style)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=100, metadata={"house": json.dumps(house)})


def _height(names: list[str], columns: int) -> float:
    flat = sum("." not in name for name in names)
    shelves = sum(HEAD + max(rows for _, _, rows in shelf) * ROW + GAP for shelf in _shelves(names, columns))
    return HEAD + -(-flat // columns) * ROW + shelves + GAP


def _shelves(names: list[str], columns: int) -> list[list[tuple[list[str], int, int]]]:
    """Packages side by side in as many rows of boxes as it takes: the modules of each, its columns and its lines."""
    packages: dict[str, list[str]] = {}
    for name in names:
        if "." in name:
            packages.setdefault(name.split(".")[0], []).append(name)
    shelves: list[list[tuple[list[str], int, int]]] = []
    room_left = 0.0
    for package in packages.values():
        wide = -(-len(package) // LINES)
        if room_left < wide * COLUMN + 2 * GAP:
            shelves.append([])
            room_left = columns * COLUMN + 2 * GAP
        shelves[-1].append((package, wide, -(-len(package) // wide)))
        room_left -= wide * COLUMN + 2 * GAP
    return shelves


def _room(axes: Axes, house: dict[str, Any], room: str, corner: Corner, height: float) -> tuple[float, ...]:
    """A box with the modules of a room, its packages as boxes within; its left, lower, right and upper edge."""
    names, columns, (left, top) = house["modules"][room], COLUMNS[room], corner
    right = left + columns * COLUMN + 2 * GAP
    _box(axes, (left, top - height), (right, top), COLOURS[room], "#fafafa")
    axes.text(left + GAP, top - 0.26, room, fontsize=13, fontweight="bold", color=COLOURS[room])
    if columns > 1:
        start = left + GAP + 0.135 * len(room) + 0.2
        axes.text(start, top - 0.26, ROOMS[room], fontsize=8.5, style="italic", color="#444444")
    flat = [f"{room}.{name}" for name in names if "." not in name]
    rows = -(-len(flat) // columns)
    _names(axes, house, flat, (left + GAP, top - HEAD), rows)
    level = top - HEAD - rows * ROW - GAP / 2
    for shelf in _shelves(names, columns):
        edge, below = left + GAP, level - HEAD - max(rows for _, _, rows in shelf) * ROW
        for package, wide, rows_inside in shelf:
            _box(axes, (edge, below), (edge + wide * COLUMN + GAP, level), COLOURS[room], "white")
            _name(axes, house, f"{room}.{package[0].split('.')[0]}", (edge + GAP / 2, level - 0.22), heading=True)
            inside = [f"{room}.{name}" for name in package]
            _names(axes, house, inside, (edge + GAP / 2, level - 0.34), rows_inside)
            edge += wide * COLUMN + 2 * GAP
        level = below - GAP
    return left, top - height, right, top


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
