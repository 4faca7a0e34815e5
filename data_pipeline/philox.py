"""Random numbers that are a function of what they are for, not of what was drawn before.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a counter of four 32-bit words
and a key of two give four random words. Written with numpy, so that the numbers do not change with a library's
version.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_32, _40 = np.uint64(32), np.uint64(40)
_MIX = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = 6


def philox(seed: int, c0: ArrayLike, c1: ArrayLike = 0, c2: ArrayLike = 0, c3: ArrayLike = 0) -> NDArray[np.uint32]:
    """Return four random words for every counter: uint32 of the counters' shape with a last axis of 4.

    The key is an integer from 0 to 2**64 - 1; the counters' words are broadcast, each is taken modulo 2**32.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"a seed is an integer from 0 to 2**64 - 1, but this one is {seed}")
    x0, x1, x2, x3 = (
        a.astype(np.uint64) & _LOW for a in np.broadcast_arrays(*(np.asarray(c) for c in (c0, c1, c2, c3)))
    )
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        p0, p1 = x0 * _M0, x2 * _M1
        x0, x1, x2, x3 = (p1 >> _32) ^ x1 ^ np.uint64(k0), p1 & _LOW, (p0 >> _32) ^ x3 ^ np.uint64(k1), p0 & _LOW
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return np.stack([x0, x1, x2, x3], axis=-1).astype(np.uint32)


def uniform(words: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Turn random words into numbers in [0, 1), of the same shape."""
    return words.astype(np.float64) * 2.0**-32


def permutation(n: int, seed: int, stream: int, index: int = 0, subindex: int = 0) -> NDArray[np.int64]:
    """Return a permutation of 0..n-1 that is a pure function of the arguments.

    The elements are sorted by a random 64-bit key each. `stream` keeps the uses of one seed apart; it must be below
    256.
    """
    counter = np.arange((n + 1) // 2, dtype=np.uint64)
    # The stream shares a word with the high bits of subindex, which stay far below 2**24.
    words = philox(seed, counter, index, subindex, stream << 24 | index >> 32)
    return np.argsort(words.view(np.uint64).reshape(-1)[:n], kind="stable")


def shuffled(positions: NDArray[np.int64], n: int, seed: int, *where: int) -> NDArray[np.int64]:
    """Return where a permutation of 0..n-1 puts some positions, without computing the rest of it.

    A Feistel network of six rounds is a permutation of the smallest square power of two that is at least n; a result
    that is n or more is sent through again until it is not (Black and Rogaway, "Ciphers with arbitrary finite domains",
    2002). Its keys come from `philox`; `where` is the stream, index and subindex of `permutation`.
    """
    stream, index, subindex = where
    half = np.uint64(max(1, -(-(n - 1).bit_length() // 2)))
    mask = np.uint64((1 << int(half)) - 1)
    keys = philox(seed, np.arange(_ROUNDS), index, subindex, stream << 24 | index >> 32).view(np.uint64)[:, 0]
    out = positions.astype(np.uint64)
    todo = np.arange(len(out))
    while len(todo):
        x = out[todo]
        left, right = x >> half, x & mask
        for key in keys:
            mixed = (right ^ key) * _MIX
            left, right = right, left ^ ((mixed ^ mixed >> _32) * _MIX >> _40 & mask)
        out[todo] = left << half | right
        todo = todo[out[todo] >= n]
    return out.astype(np.int64)
