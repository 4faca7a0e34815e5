"""Parameters and multiply-accumulates of a LaViT in closed form, without building it.

A MAC is one multiplication and addition in a Linear layer, a convolution or an attention product; norms, softmax, GELU
and additions are not counted, as is the custom. `torch.utils.flop_counter` counts two FLOPs for each.
"""

from .config import Grid, LaViTConfig


def count_parameters(config: LaViTConfig) -> int:
    """The number of parameters, Psi, Theta and position embeddings at the configuration's own image size included."""
    total, channels, side = 0, config.in_channels, config.patch_size
    grids = config.grids(config.image_size)
    for stage, (grid, key_grid) in enumerate(grids):
        width, ratio = config.widths[stage], config.reduction_ratios[stage]
        queries, keys = _area(grid), _area(key_grid)
        hidden = round(width * config.mlp_ratios[stage])
        total += width * (channels * side**2 + 3) + queries * width  # convolution, norm, positions
        if stage and config.attention_residual:
            before, heads = config.heads[stage - 1], config.heads[stage]
            total += before * 4 * _key_ratio(config, stage) ** 2 + heads * before + heads
        reduction = width * (width * ratio**2 + 3) if ratio > 1 else 0
        shared = 4 * width + 2 * width * hidden + hidden + width + width * (width + 1) + reduction
        less_blocks = config.depths[stage] - config.vanilla_blocks[stage]
        total += config.depths[stage] * shared
        total += config.vanilla_blocks[stage] * width * (3 * width + 1)
        maps = keys * (keys + 1) + queries**2 if config.learned_maps else 0
        total += less_blocks * (width**2 + maps)
        channels, side = width, 2
    width = config.widths[-1]
    pool = width * (3 * width + 2) if config.pool == "class_attention" else 0
    return total + 2 * width + pool + config.num_classes * (width + 1)


def count_macs(config: LaViTConfig, image_size: Grid | None = None) -> int:
    """Multiply-accumulates of one image's forward pass, at `image_size` (height, width) or the configuration's own.

    At another size than the configuration's own, resampling Psi and Theta costs more, once a call; it is not counted.

    Raises:
        ValueError: a side is not a multiple of `config.stride`.
    """
    total, channels, side = 0, config.in_channels, config.patch_size
    for stage, (grid, key_grid) in enumerate(config.grids(image_size or config.image_size)):
        width, queries, keys = config.widths[stage], _area(grid), _area(key_grid)
        total += queries * width * channels * side**2
        if stage and config.attention_residual:
            heads, before = config.heads[stage], config.heads[stage - 1]
            total += queries * keys * heads * before * 4 * _key_ratio(config, stage) ** 2
        hidden = round(width * config.mlp_ratios[stage])
        vanilla, depth = config.vanilla_blocks[stage], config.depths[stage]
        total += depth * 2 * queries * width * hidden
        total += vanilla * attention_macs(config, stage, (grid, key_grid), less=False)
        total += (depth - vanilla) * attention_macs(config, stage, (grid, key_grid), less=True)
        channels, side = width, 2
    width, tokens = config.widths[-1], _area(grid)
    pool = 2 * tokens * width * (width + 1) + width**2 if config.pool == "class_attention" else 0
    return total + pool + width * config.num_classes


def attention_macs(config: LaViTConfig, stage: int, grids: tuple[Grid, Grid], *, less: bool) -> int:
    """Multiply-accumulates of one block's attention for one image, the MLP left out.

    Args:
        config: the architecture.
        stage: counted from 0.
        grids: the stage's query and key grids, from `config.grids`.
        less: Less Attention, `H (N M^2 + N^2 M)` for Theta and Psi where it has them; otherwise Vanilla Attention,
            `N C^2 + M C^2` for Q and K and `N M C` for their product. What both have is counted in both: spatial
            reduction, V, softmax(A) V, the output projection.
    """
    width, ratio, (queries, keys) = config.widths[stage], config.reduction_ratios[stage], map(_area, grids)
    shared = keys * width**2 + queries * keys * width + queries * width**2
    shared += keys * width**2 * ratio**2 if ratio > 1 else 0
    if less:
        return shared + (config.heads[stage] * queries * keys * (keys + queries) if config.learned_maps else 0)
    return shared + queries * width**2 + keys * width**2 + queries * keys * width


def _area(grid: Grid) -> int:
    return grid[0] * grid[1]


def _key_ratio(config: LaViTConfig, stage: int) -> int:
    return config.key_side(stage) // config.key_side(stage - 1)
