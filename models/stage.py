"""One stage: patch embedding, position embedding, the attention residual from the stage before, then the blocks."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import LessAttention, VanillaAttention
from .block import Block, layer_norm
from .config import STAGES, Grid, LaViTConfig
from .diagonality import Diagonality
from .resample import resample_table
from .residual import AttentionResidual

Scores = tuple[Tensor, Grid, Grid]
"""Pre-softmax scores (batch, heads, M, N) with their query grid (N) and their key grid (M)."""


class PatchEmbedding(nn.Module):
    """A convolution whose kernel is its stride, then LayerNorm (this project's choice, as in PVT)."""

    def __init__(self, channels: int, width: int, side: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.side = side
        self.conv = nn.Conv2d(channels, width, side, stride=side)
        self.norm = norm(width)

    def forward(self, features: Tensor) -> Tensor:
        """(batch, channels, side h, side w) to tokens (batch, h w, width)."""
        return self.norm(self.conv(features).permute(0, 2, 3, 1).flatten(1, 2))


class PositionEmbedding(nn.Module):
    """A learned vector per token, resampled where the grid is not its own."""

    def __init__(self, grid: Grid, width: int) -> None:
        super().__init__()
        self.grid = grid
        self.table = nn.Parameter(torch.empty(*grid, width))

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """(batch, N, C) to the same shape, N = grid height x width."""
        table = self.table.flatten(0, 1)
        return tokens + (table if grid == self.grid else resample_table(table, self.grid, grid)).to(tokens.dtype)


class Stage(nn.Module):
    """Vanilla Attention blocks, then Less Attention blocks, all at one resolution."""

    def __init__(self, config: LaViTConfig, stage: int) -> None:
        super().__init__()
        norm = partial(layer_norm, kind=config.norm)
        width, heads, ratio = config.widths[stage], config.heads[stage], config.reduction_ratios[stage]
        depth, vanilla = config.depths[stage], config.vanilla_blocks[stage]
        grid, _ = config.grids(config.image_size)[stage]
        self.ratio = ratio
        self.checkpointed = False
        channels, side = (config.widths[stage - 1], 2) if stage else (config.in_channels, config.patch_size)
        self.embed = PatchEmbedding(channels, width, side, norm)
        self.position = PositionEmbedding(grid, width)
        self.residual = None
        if stage and config.attention_residual:
            key_ratio = config.key_side(stage) // config.key_side(stage - 1)
            self.residual = AttentionResidual(config.heads[stage - 1], heads, key_ratio)
        feeds_next = config.attention_residual and stage + 1 < STAGES
        before, total = sum(config.depths[:stage]), sum(config.depths)
        blocks = []
        for block in range(depth):
            # Scores are materialized only by the last Vanilla Attention block, and only if anyone reads them.
            keeps = block == vanilla - 1 and (depth > vanilla or feeds_next)
            attention = (
                VanillaAttention(width, heads, ratio, norm, keeps_scores=keeps)
                if block < vanilla
                else LessAttention(width, heads, ratio, norm, grid, learned_maps=config.learned_maps)
            )
            rate = config.drop_path * (before + block) / max(total - 1, 1)
            blocks.append(Block(width, attention, config.mlp_ratios[stage], rate, norm))
        self.blocks = cast("Sequence[Block]", nn.ModuleList(blocks))

    def forward(
        self, features: Tensor, before: Scores | None, uniforms: Tensor | None, with_diagonality: Diagonality
    ) -> tuple[Tensor, Scores | None, list[Tensor]]:
        """Run the stage.

        Args:
            features: the image, or the map of the stage before, (batch, channels, height, width).
            before: the last scores of the stage before, if there is a residual to be made of them.
            uniforms: (2 x depth, batch) for stochastic depth, or None.
            with_diagonality: whether to compute the diagonality loss of the Less Attention blocks.

        Returns:
            This stage's map (batch, C, h, w), a channels-last view of its tokens; its last scores; the losses.
        """
        tokens = self.embed(features)
        side = self.embed.side
        grid = (features.shape[2] // side, features.shape[3] // side)
        tokens = self.position(tokens, grid)
        scores = None if self.residual is None or before is None else self.residual(*before)
        losses = []
        for index, block in enumerate(self.blocks):
            drawn = None if uniforms is None else uniforms[2 * index : 2 * index + 2]
            arguments = (tokens, grid, scores, drawn, with_diagonality)
            if self.checkpointed and torch.is_grad_enabled():
                # Scores go in as an argument, so what is kept for the recomputation is the very tensor that the block
                # before gave out. No block draws random numbers, so there is no generator state to keep.
                tokens, scores, loss = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens, scores, loss = block(*arguments)
            if loss is not None:
                losses.append(loss)
        key_grid = (grid[0] // self.ratio, grid[1] // self.ratio)
        last = None if scores is None else (scores, grid, key_grid)
        return tokens.transpose(1, 2).unflatten(2, grid), last, losses
