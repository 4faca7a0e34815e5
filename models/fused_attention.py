"""Softmax, product with V and pooling of queries as one operator of torch, whose kernels are written in Triton.

`attention_kernel: triton` takes it where it can run (`can_run`); numbers are those of torch's operators to rounding.
Triton is imported when the operator first runs, so that all else works without it. As a custom operator it goes through
torch.compile in one piece; its kernels come from `models.attention_kernel`. Not measured on a GPU.
"""

import contextlib
import functools
import importlib
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models.config import Grid, LaViTConfig

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's own switch, which it reads when kernels are defined: they then run on the CPU, for tests."""
CAPABILITY = (8, 0)
"""The least compute capability of a GPU that the kernels are compiled for in tests."""
WIDE, NARROW = 4096, 2048
"""Scores in a tile, forward and backward: as many as spill no register in the published variants. Not measured."""
QUERIES_A_PART = 512
"""Of the backward pass: how many queries one program adds up the gradient of V for."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def require(device: torch.device) -> None:
    """Refuse a device on which training would never take the kernels that it was told to take.

    Raises:
        RuntimeError: no GPU, too old a one, or no Triton.
    """
    if device.type != "cuda":
        raise RuntimeError(
            f"attention_kernel: 'triton' runs on NVIDIA GPUs and this is a {device.type}; use attention_kernel: 'torch'"
        )
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        raise RuntimeError(
            f"attention_kernel: 'triton' needs a GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or more, "
            f"this has {found[0]}.{found[1]}; use attention_kernel: 'torch'"
        )
    _kernels()


def can_run(scores: Tensor, values: Tensor, grid: Grid, key_grid: Grid, *, pooled: bool) -> bool:
    """Whether the kernels take these; by design they leave the rest to torch's operators.

    That is what lies on a CPU (outside Triton's interpreter) or on a GPU that is too old (weights that were trained
    with the kernels run anywhere), a model on its way through torch.export, and what does not fit (`fits`).
    """
    if torch.compiler.is_exporting() or not (_is_capable(scores.device) or INTERPRETED):
        return False
    return fits(scores, values, grid, key_grid, pooled=pooled)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_capable(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= CAPABILITY


def fits(scores: Tensor, values: Tensor, grid: Grid, key_grid: Grid, *, pooled: bool) -> bool:
    """Whether type and shapes are such that no register is spilled.

    Types are fp32, bf16 and fp16. With heads of 64 channels at most 256 keys fit with 16 bits, and 64 in fp32, which
    tensor cores do not take. Pooled, a place may have 64 queries at 64 keys (32 in fp32) and 16 at 256.
    """
    if scores.dtype not in DTYPES or values.dtype not in DTYPES:
        return False
    sizes = backward_constants(scores, values, grid, key_grid, pooled)
    most, most_values = (NARROW, 4096) if values.dtype == torch.float32 else (WIDE, 16384)
    keys, columns = sizes["KEYS"], sizes["CELLS"] * sizes["SLOTS"]
    return keys * columns <= most and keys * sizes["WIDTH"] <= most_values


def fitting_stages(config: LaViTConfig, dtype: torch.dtype) -> list[int]:
    """The stages, counted from 0, in which training at the network's own size takes the kernels on a GPU."""
    found = []
    for stage, (grid, key_grid) in enumerate(config.grids(config.image_size)):
        queries, keys = grid[0] * grid[1], key_grid[0] * key_grid[1]
        scores = torch.empty(1, config.heads[stage], keys, queries, device="meta", dtype=dtype)
        values = torch.empty(1, keys, config.widths[stage], device="meta", dtype=dtype)
        if fits(scores, values, grid, key_grid, pooled=config.depths[stage] > config.vanilla_blocks[stage]):
            found.append(stage)
    return found


def attend(scores: Tensor, values: Tensor, grid: Grid, key_grid: Grid, *, pooled: bool) -> tuple[Tensor, Tensor | None]:
    """`softmax(A) V` over the keys and, where wanted, the attention of `pool_queries`.

    Args:
        scores: (batch, heads, M, N).
        values: (batch, M, C), the heads one after the other in the last axis.
        grid: query grid, N = height x width.
        key_grid: key grid, M = height x width; each side divides the query grid's.
        pooled: whether the second result is wanted.

    Returns:
        (batch, N, C), of the values' type; and (batch, heads, M, M) in fp32 or None.

    Raises:
        RuntimeError: Triton is not there.
    """
    output, square = _attend(scores, values, list(grid), list(key_grid), pooled)
    return output, square if pooled else None


@torch.library.custom_op("lavit::attend", mutates_args=())
def _attend(
    scores: Tensor, values: Tensor, grid: list[int], key_grid: list[int], pooled: bool
) -> tuple[Tensor, Tensor]:
    scores, values = scores.contiguous(), _rows(values)
    output, square = _empty(scores, values, pooled)
    sizes = constants(scores, values, grid, key_grid, pooled)
    matrices = scores.shape[0] * scores.shape[1]
    with _on(scores):
        _kernels().forward_kernel[(matrices * sizes["TILES"],)](
            scores, values, output, square, values.stride(0), values.stride(1), **sizes
        )
    return output, square


def _empty(scores: Tensor, values: Tensor, pooled: bool) -> tuple[Tensor, Tensor]:
    batch, heads, keys, queries = scores.shape
    square = (batch, heads, keys, keys) if pooled else (0,)
    return values.new_empty(batch, queries, values.shape[2]), scores.new_empty(square, dtype=torch.float32)


@_attend.register_fake
def _fake(scores: Tensor, values: Tensor, _grid: list[int], _keys: list[int], pooled: bool) -> tuple[Tensor, Tensor]:
    return _empty(scores, values, pooled)


@torch.library.custom_op("lavit::attend_backward", mutates_args=())
def _attend_backward(  # noqa: PLR0917 - operators take their arguments by position
    scores: Tensor, values: Tensor, to_output: Tensor, to_pooled: Tensor, grid: list[int], key_grid: list[int],
    pooled: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    scores, values = scores.contiguous(), _rows(values)
    to_output, to_pooled = to_output.contiguous(), to_pooled.contiguous()
    sizes = backward_constants(scores, values, grid, key_grid, pooled)
    to_scores = scores.new_empty(scores.shape)
    parts = values.new_empty(sizes["PARTS"], *values.shape, dtype=torch.float32)
    matrices = scores.shape[0] * scores.shape[1]
    with _on(scores):
        _kernels().backward_kernel[(matrices * sizes["PARTS"],)](
            scores, values, to_output, to_pooled, to_scores, parts, values.stride(0), values.stride(1), **sizes
        )
    return to_scores, parts.sum(0).to(values.dtype)


@_attend_backward.register_fake
def _fake_backward(scores: Tensor, values: Tensor, *_others: Any) -> tuple[Tensor, Tensor]:
    return scores.new_empty(scores.shape), values.new_empty(values.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ARG001 - torch's name
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.sizes = inputs[2:]


def _gradients(ctx: Any, to_output: Tensor, to_pooled: Tensor) -> tuple[Tensor | None, ...]:
    return (*_attend_backward(*ctx.saved_tensors, to_output, to_pooled, *ctx.sizes), None, None, None)


_attend.register_autograd(_gradients, setup_context=_keep)


def constants(
    scores: Tensor, values: Tensor, grid: Sequence[int], key_grid: Sequence[int], pooled: bool
) -> dict[str, Any]:
    """What `forward_kernel` is compiled for: its arguments in capitals, and Triton's own options.

    Args:
        scores: (batch, heads, M, N).
        values: (batch, M, C).
        grid: query grid.
        key_grid: key grid.
        pooled: whether the attention is pooled; otherwise a place is one query.
    """
    return _constants(scores, values, grid, key_grid, pooled, most=WIDE)


def backward_constants(
    scores: Tensor, values: Tensor, grid: Sequence[int], key_grid: Sequence[int], pooled: bool
) -> dict[str, Any]:
    """As `constants`, for `backward_kernel`."""
    sizes = _constants(scores, values, grid, key_grid, pooled, most=NARROW)
    tiles = max(1, QUERIES_A_PART // (sizes["CELLS"] * sizes["SLOTS"]))
    return sizes | {"PARTS": -(-sizes["TILES"] // tiles), "TILES_A_PART": tiles}


def _constants(
    scores: Tensor, values: Tensor, grid: Sequence[int], key_grid: Sequence[int], pooled: bool, *, most: int
) -> dict[str, Any]:
    _, heads, keys, queries = scores.shape
    cell = (grid[0] // key_grid[0], grid[1] // key_grid[1]) if pooled else (1, 1)
    slots, rows, places = _power(cell[0] * cell[1]), max(16, _power(keys)), queries // (cell[0] * cell[1])
    # No more columns than there are queries, no fewer than tensor cores take.
    columns = max(min(most // rows, 64, _power(places) * slots), slots, 16)
    cells = columns // slots
    return {
        "HEADS": heads, "M": keys, "N": queries, "D": values.shape[2] // heads, "W": grid[1],
        "CELL_H": cell[0], "CELL_W": cell[1], "SLOTS": slots, "CELLS": cells, "PLACES": places,
        "TILES": -(-places // cells), "KEYS": rows, "WIDTH": max(16, _power(values.shape[2] // heads)),
        "POOLED": pooled, "PRECISION": _precision(),
        "num_warps": 8 if values.dtype == torch.float32 or rows > 64 else 4, "num_stages": 1,
    }  # fmt: skip


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _precision() -> str:
    """Of products in fp32: that of torch's own. Its `allow_tf32` cannot be read once the newer setting was made."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _power(count: int) -> int:
    """The least power of two that is no less."""
    return 1 << (count - 1).bit_length()


def _rows(values: Tensor) -> Tensor:
    """The kernels step over batch and tokens, a half of a joint projection as it lies; channels must be contiguous."""
    return values if values.stride(2) == 1 else values.contiguous()


def _on(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@functools.cache
def _kernels() -> Any:
    try:
        return importlib.import_module("models.attention_kernel")
    except ImportError as error:
        raise RuntimeError(
            f"attention_kernel: 'triton' needs Triton, which torch's builds for CUDA bring along ({error}); "
            "pip install triton, or use attention_kernel: 'torch'"
        ) from error
