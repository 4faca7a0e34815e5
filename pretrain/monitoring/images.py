"""Draws attention laid over images."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from data_pipeline.preview import CELL, LINE, Pixels, thumbnail, write_line

SHADES = np.array([[13, 8, 135], [126, 3, 168], [204, 71, 120], [248, 149, 64], [240, 249, 33]], dtype=np.float32)
"""From little to much attention: five colors of matplotlib's "plasma", whose brightness rises evenly."""


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
        write_line(sheet, ((column + 1) * CELL, 0), block.title)
    for number, pixels in enumerate(images):
        for kind in range(2):
            y = LINE + (2 * number + kind) * CELL
            plain = thumbnail(pixels)
            if kind:
                ImageDraw.Draw(plain).circle((CELL // 2, CELL // 2), 4, outline="red")
            sheet.paste(plain, (0, y))
            for column, block in enumerate(maps):
                heat = (block.middle if kind else block.everywhere)[number]
                sheet.paste(Image.blend(thumbnail(pixels), _heat(heat), 0.65), ((column + 1) * CELL, y))
    return np.asarray(sheet)


def _heat(values: NDArray[np.float32]) -> Image.Image:
    share = np.nan_to_num(values / max(float(values.max()), 1e-30)).clip(0, 1)
    steps = np.arange(len(SHADES)) / (len(SHADES) - 1)
    colors = np.stack([np.interp(share, steps, SHADES[:, channel]) for channel in range(3)], -1)
    return Image.fromarray(colors.round().astype(np.uint8)).resize((CELL, CELL), Image.Resampling.NEAREST)
