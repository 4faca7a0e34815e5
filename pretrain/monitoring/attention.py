"""The attention of a few fixed images as the network learns, in numbers and laid over the images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from data_pipeline.preview import CELL, LINE, Pixels, thumbnail, write_line
from models.config import Grid, LaViTConfig
from models.diagnostics import attention_diagnostics

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


def measure_attention(model: Any, images: torch.Tensor, dtype: torch.dtype) -> tuple[dict[str, float], list[BlockMap]]:
    """Make one forward pass without gradients; the weights and torch's random numbers stay as they are.

    Collective at ZeRO stage 3, where parameters are gathered for it.

    Args:
        model: the LaViT.
        images: (m, 3, H, W) normalized.
        dtype: what it computes in.

    Returns:
        The numbers of every block, and maps of the blocks that ``drawn_blocks`` names.
    """
    drawn = drawn_blocks(model.config)
    seen: dict[tuple[int, int], tuple[torch.Tensor, Grid]] = {}

    def look(stage: int, block: int, attention: torch.Tensor, grid: Grid, key_grid: Grid) -> None:
        if (stage, block) in drawn:
            by_key = attention.float().mean(1)  # (m, M, N) over heads
            middle = by_key[..., grid[0] // 2 * grid[1] + grid[1] // 2]
            seen[stage, block] = torch.stack([by_key.mean(-1), middle], 1), key_grid

    numbers: dict[str, float] = {}
    for row in attention_diagnostics(model, images.to(dtype), look):
        where = f"stage{row.stage + 1}_{'va' if row.kind == 'vanilla' else 'la'}{row.block + 1}"
        named = {"diagonality": row.diagonality, "symmetry": row.symmetry, "saturation": row.saturation}
        numbers |= {f"{name}/{where}": value for name, value in named.items() if value is not None}
    maps = []
    for place, (both, key_grid) in seen.items():
        everywhere, middle = both.view(len(both), 2, *key_grid).cpu().numpy().swapaxes(0, 1)
        maps.append(BlockMap(f"stage {place[0] + 1}, {drawn[place]} {place[1] + 1}", everywhere, middle))
    return numbers, maps


def drawn_blocks(config: LaViTConfig) -> dict[tuple[int, int], str]:
    """Stage and block of what is drawn, with its kind: of each stage the last VA, the first and the last LA block."""
    blocks = {}
    for stage, (depth, vanilla) in enumerate(zip(config.depths, config.vanilla_blocks, strict=True)):
        for block in sorted({vanilla - 1, min(vanilla, depth - 1), depth - 1}):
            blocks[stage, block] = "VA" if block < vanilla else "LA"
    return blocks


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
