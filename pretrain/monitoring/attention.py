"""The attention of a few fixed images as the network learns."""

from typing import Any

import torch

from models.config import Grid, LaViTConfig
from models.diagnostics import BlockDiagnostics, attention_diagnostics
from pretrain.monitoring.images import BlockMap


class AttentionWatch:
    """Keeps the first images that this rank evaluates, and measures and maps their attention.

    Args:
        count: how many; 0 for none.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self.images: torch.Tensor | None = None
        """(m, 3, H, W) normalized; None before the first evaluation."""

    def keep(self, images: torch.Tensor) -> None:
        """Take the images from the first batch that this is called with."""
        if self.images is None and self._count:
            self.images = images[: self._count].clone()

    def look(self, model: Any, dtype: torch.dtype) -> tuple[dict[str, float], list[BlockMap]]:
        """Make one forward pass without gradients; the weights and torch's random numbers stay as they are.

        Collective at ZeRO stage 3, where parameters are gathered for it.

        Args:
            model: the LaViT.
            dtype: what it computes in.

        Returns:
            The numbers of every block, and maps of the blocks that ``drawn_blocks`` names.
        """
        assert self.images is not None, "there was no evaluation yet"
        drawn = drawn_blocks(model.config)
        seen: dict[tuple[int, int], tuple[torch.Tensor, Grid]] = {}

        def look(stage: int, block: int, attention: torch.Tensor, grid: Grid, key_grid: Grid) -> None:
            if (stage, block) in drawn:
                by_key = attention.float().mean(1)  # (m, M, N) over heads
                middle = by_key[..., grid[0] // 2 * grid[1] + grid[1] // 2]
                seen[stage, block] = torch.stack([by_key.mean(-1), middle], 1), key_grid

        numbers = attention_diagnostics(model, self.images.to(dtype), look)
        maps = []
        for place, (both, key_grid) in seen.items():
            everywhere, middle = both.view(len(both), 2, *key_grid).cpu().numpy().swapaxes(0, 1)
            maps.append(BlockMap(f"stage {place[0] + 1}, {drawn[place]} {place[1] + 1}", everywhere, middle))
        return _by_name(numbers), maps


def drawn_blocks(config: LaViTConfig) -> dict[tuple[int, int], str]:
    """Stage and block of what is drawn, with its kind: of each stage the last VA, the first and the last LA block."""
    blocks = {}
    for stage, (depth, vanilla) in enumerate(zip(config.depths, config.vanilla_blocks, strict=True)):
        for block in sorted({vanilla - 1, min(vanilla, depth - 1), depth - 1}):
            blocks[stage, block] = "VA" if block < vanilla else "LA"
    return blocks


def _by_name(rows: list[BlockDiagnostics]) -> dict[str, float]:
    values = {}
    for row in rows:
        kind = "va" if row.kind == "vanilla" else "la"
        where = f"stage{row.stage + 1}_{kind}{row.block + 1}"
        values[f"diagonality/{where}"] = row.diagonality
        values[f"symmetry/{where}"] = row.symmetry
        if row.saturation is not None:
            values[f"saturation/{where}"] = row.saturation
    return values
