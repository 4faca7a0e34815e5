"""The Triton kernels of `models.fused_attention`: softmax, product with V and pooling of queries in one pass.

Importing this module needs Triton. Scores are key-major, (batch, heads, M keys, N queries), as everywhere. A program
holds all the keys of a tile of queries, so its softmax is whole and the backward pass repeats it from the scores, which
are kept for the next block anyway. The softmaxed matrix is never written, forward or backward.

Queries are dealt to tiles by the places that `pool_queries` averages: a place has CELL_H x CELL_W queries, in SLOTS
(the next power of two) columns of a tile. So a sum over a place is a sum over an axis of the tile: without atomics, and
always in the same order. Sizes are compile-time constants: a network has a few shapes, and Triton can then prove which
loads are aligned. Nothing is tuned by timing: another tile would change the last bits from one start of a run to the
next.
"""

import triton
import triton.language as tl

from models import fused_attention

INTERPRETED = tl.constexpr(fused_attention.INTERPRETED)


@triton.jit
def _queries(tile, W: tl.constexpr, CELL_H: tl.constexpr, CELL_W: tl.constexpr, SLOTS: tl.constexpr,
             CELLS: tl.constexpr, PLACES: tl.constexpr):  # fmt: skip
    """The query of each column of a tile, CELLS * SLOTS of them, and whether there is one."""
    column = tile * (CELLS * SLOTS) + tl.arange(0, CELLS * SLOTS)
    if SLOTS == 1:  # the same as below, said so that loads are known to be contiguous
        return column, column < PLACES
    place, slot = column // SLOTS, column % SLOTS
    across: tl.constexpr = W // CELL_W
    row = place // across * CELL_H + slot // CELL_W
    query = row * W + place % across * CELL_W + slot % CELL_W
    return query, (place < PLACES) & (slot < CELL_H * CELL_W)


@triton.jit
def _attention(scores, key, query, has_query, M: tl.constexpr, N: tl.constexpr):
    """Softmax over the keys of a tile, fp32 (keys, columns); zero where there is no key or no query."""
    there = (key < M)[:, None] & has_query[None, :]
    tile = tl.load(scores + key[:, None] * N + query[None, :], mask=there, other=0.0).to(tl.float32)
    tile = tl.where((key < M)[:, None], tile, float("-inf"))
    raised = tl.exp(tile - tl.max(tile, axis=0)[None, :])
    return tl.where(has_query[None, :], raised / tl.sum(raised, axis=0)[None, :], 0.0)


@triton.jit
def _product(left, right, PRECISION: tl.constexpr):
    """Matrix product of one type, summed in fp32."""
    if INTERPRETED:  # Triton's interpreter keeps bf16 as integers and multiplies those
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision=PRECISION)


@triton.jit
def forward_kernel(
    scores, values, output, pooled, value_batch, value_row,
    HEADS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
    CELL_H: tl.constexpr, CELL_W: tl.constexpr, SLOTS: tl.constexpr, CELLS: tl.constexpr, PLACES: tl.constexpr,
    TILES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, POOLED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output (batch, N, heads, D) and, where POOLED, the attention averaged over places, (batch, heads, M, PLACES).

    One program a tile of a head of a picture. Values are (batch, M, heads, D), the last two axes contiguous.
    """
    program = tl.program_id(0).to(tl.int64)
    tile, matrix = (program % TILES).to(tl.int32), program // TILES
    batch, head = matrix // HEADS, matrix % HEADS
    key, width = tl.arange(0, KEYS), tl.arange(0, WIDTH)
    query, has_query = _queries(tile, W, CELL_H, CELL_W, SLOTS, CELLS, PLACES)
    attention = _attention(scores + matrix * (M * N), key, query, has_query, M, N)
    of_head = (key < M)[:, None] & (width < D)[None, :]
    source = values + batch * value_batch + head * D + key[:, None] * value_row + width[None, :]
    value = tl.load(source, mask=of_head, other=0.0)
    product = _product(tl.trans(attention.to(value.dtype)), value, PRECISION)
    target = output + (batch * N * HEADS + head) * D + query[:, None] * (HEADS * D) + width[None, :]
    tl.store(target, product.to(value.dtype), mask=has_query[:, None] & (width < D)[None, :])
    if POOLED:
        mean = tl.sum(tl.reshape(attention, (KEYS, CELLS, SLOTS)), axis=2) / (CELL_H * CELL_W)
        place = tile * CELLS + tl.arange(0, CELLS)
        target = pooled + matrix * (M * PLACES) + key[:, None] * PLACES + place[None, :]
        tl.store(target, mean, mask=(key < M)[:, None] & (place < PLACES)[None, :])


@triton.jit
def backward_kernel(
    scores, values, to_output, to_pooled, to_scores, to_values, value_batch, value_row,
    HEADS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
    CELL_H: tl.constexpr, CELL_W: tl.constexpr, SLOTS: tl.constexpr, CELLS: tl.constexpr, PLACES: tl.constexpr,
    TILES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, POOLED: tl.constexpr, PRECISION: tl.constexpr,
    PARTS: tl.constexpr, TILES_A_PART: tl.constexpr,
):  # fmt: skip
    """Gradients of scores (batch, heads, M, N) and, fp32, of values (PARTS, batch, M, heads, D), to be summed.

    `dS = P (dP - sum over keys of P dP)`, where dP is `V dO^T` and a query's share of its place's gradient. One program
    a part of the tiles of a head of a picture: the parts depend on the grid alone, not on the batch or the device.
    """
    program = tl.program_id(0).to(tl.int64)
    part, matrix = (program % PARTS).to(tl.int32), program // PARTS
    batch, head = matrix // HEADS, matrix % HEADS
    key, width = tl.arange(0, KEYS), tl.arange(0, WIDTH)
    of_head = (key < M)[:, None] & (width < D)[None, :]
    source = values + batch * value_batch + head * D + key[:, None] * value_row + width[None, :]
    value = tl.load(source, mask=of_head, other=0.0)
    to_value = tl.zeros((KEYS, WIDTH), dtype=tl.float32)
    for tile in range(part * TILES_A_PART, min((part + 1) * TILES_A_PART, TILES)):
        query, has_query = _queries(tile, W, CELL_H, CELL_W, SLOTS, CELLS, PLACES)
        attention = _attention(scores + matrix * (M * N), key, query, has_query, M, N)
        place = tile * CELLS + tl.arange(0, CELLS)
        of_output = to_output + (batch * N * HEADS + head) * D + query[:, None] * (HEADS * D) + width[None, :]
        gradient = tl.load(of_output, mask=has_query[:, None] & (width < D)[None, :], other=0.0)
        to_value += _product(attention.to(value.dtype), gradient, PRECISION)
        to_attention = _product(value, tl.trans(gradient), PRECISION)
        if POOLED:
            of_place = to_pooled + matrix * (M * PLACES) + key[:, None] * PLACES + place[None, :]
            share = tl.load(of_place, mask=(key < M)[:, None] & (place < PLACES)[None, :], other=0.0)
            share = tl.broadcast_to(share[:, :, None] / (CELL_H * CELL_W), (KEYS, CELLS, SLOTS))
            to_attention += tl.reshape(share, (KEYS, CELLS * SLOTS))
        mean = tl.sum(attention * to_attention, axis=0)
        to_score = attention * (to_attention - mean[None, :])
        of_tile = to_scores + matrix * (M * N) + key[:, None] * N + query[None, :]
        tl.store(of_tile, to_score.to(to_scores.dtype.element_ty), mask=(key < M)[:, None] & has_query[None, :])
    target = to_values + ((part * (tl.num_programs(0) // (PARTS * HEADS)) + batch) * M * HEADS + head) * D
    tl.store(target + key[:, None] * (HEADS * D) + width[None, :], to_value, mask=of_head)
