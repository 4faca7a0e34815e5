"""Draws training images with their labels, and attention laid over images."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Pixels = NDArray[np.uint8]
"""(height, width, 3)."""
COLUMNS = 8
CELL = 112
"""Side of a drawn image in pixels, whatever its own."""
LINE = 16
"""Height of a line of text in pixels."""
SHADES = np.array([[13, 8, 135], [126, 3, 168], [204, 71, 120], [248, 149, 64], [240, 249, 33]], dtype=np.float32)
"""From little to much attention: five colours of matplotlib's "plasma", whose brightness rises evenly."""


def to_pixels(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> list[Pixels]:
    """What the network is fed, (m, 3, H, W) normalized, as pixels again."""
    scale, shift = (torch.tensor(values).view(3, 1, 1) for values in (std, mean))
    plain = (images.float().cpu() * scale + shift).nan_to_num().clamp(0, 1)
    return list((255 * plain).round().byte().permute(0, 2, 3, 1).numpy())


def draw_grid(images: Sequence[Pixels], captions: Sequence[str]) -> Pixels:
    """Draw images in rows of 8, each with its caption below it, whose lines must be equally many."""
    columns = min(COLUMNS, len(images))
    height = CELL + LINE * (captions[0].count("\n") + 1)
    sheet = Image.new("RGB", (columns * CELL, math.ceil(len(images) / columns) * height), "white")
    for index, (pixels, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = index % columns * CELL, index // columns * height
        sheet.paste(_cell(pixels), (x, y))
        for number, line in enumerate(caption.split("\n")):
            _write(sheet, (x, y + CELL + number * LINE), line)
    return np.asarray(sheet)


@dataclass(frozen=True)
class BlockMap:
    """Where one block of the network looks, averaged over heads, for each of m images."""

    title: str
    everywhere: NDArray[np.float32]
    """(m, h, w) over the key grid: attention that a place is paid by all queries together."""
    middle: NDArray[np.float32]
    """(m, h, w): attention that it is paid by the query in the image's middle."""


def draw_attention(images: Sequence[Pixels], maps: Sequence[BlockMap]) -> Pixels:
    """A row for each image and kind of map, a column for each block; each map is scaled to its highest value.

    The first column has the images, the middle query's place marked where its attention is what the row shows.
    """
    sheet = Image.new("RGB", ((len(maps) + 1) * CELL, LINE + 2 * len(images) * CELL), "white")
    for column, block in enumerate(maps):
        _write(sheet, ((column + 1) * CELL, 0), block.title)
    for number, pixels in enumerate(images):
        for kind in range(2):
            y = LINE + (2 * number + kind) * CELL
            plain = _cell(pixels)
            if kind:
                ImageDraw.Draw(plain).circle((CELL // 2, CELL // 2), 4, outline="red")
            sheet.paste(plain, (0, y))
            for column, block in enumerate(maps):
                heat = (block.middle if kind else block.everywhere)[number]
                sheet.paste(Image.blend(_cell(pixels), _heat(heat), 0.65), ((column + 1) * CELL, y))
    return np.asarray(sheet)


def _cell(pixels: Pixels) -> Image.Image:
    small = max(pixels.shape[:2]) < CELL
    return Image.fromarray(pixels).resize((CELL, CELL), Image.Resampling.NEAREST if small else Image.Resampling.BOX)


def _heat(values: NDArray[np.float32]) -> Image.Image:
    share = np.nan_to_num(values / max(float(values.max()), 1e-30)).clip(0, 1)
    steps = np.arange(len(SHADES)) / (len(SHADES) - 1)
    colours = np.stack([np.interp(share, steps, SHADES[:, channel]) for channel in range(3)], -1)
    return Image.fromarray(colours.round().astype(np.uint8)).resize((CELL, CELL), Image.Resampling.NEAREST)


def _write(sheet: Image.Image, place: tuple[int, int], text: str) -> None:
    font, shown = ImageFont.load_default(11), text
    while shown and font.getlength(shown) > CELL - 4:
        shown = shown[:-2].rstrip("…") + "…" if len(shown) > 2 else ""
    ImageDraw.Draw(sheet).text((place[0] + 2, place[1] + 1), shown, fill="black", font=font)
