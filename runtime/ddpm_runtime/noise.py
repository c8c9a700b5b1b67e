"""Noise belongs to the image: a pure function of (seed, image index, draw number, position).

    bits  = Philox4x32-10( key = seed, counter = (quad, draw, index_low, index_high) )
    noise = Box–Muller of the four 32-bit words: four normals a quad of consecutive positions

Draw 0 is x_T; row k of a sampler program uses draw k + 1. Nothing depends on batch size, lane,
order, thread or device: the CUDA kernel computes the same bits.

Sources: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC'11), §3.3 (Philox);
Box & Muller, Ann. Math. Statist. 29 (1958).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigurationError
from .portable_math import log_unit, sincos_turn

__all__ = ["MAX_SEED", "fill_noise", "noise", "philox4x32"]

MAX_SEED = 2**64 - 1

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint32(0x9E3779B9), np.uint32(0xBB67AE85))
_ROUNDS = 10
_CHUNK_QUADS = 1 << 14  # scratch arrays that stay in the second-level cache

Words = NDArray[np.uint32]


def noise(seed: int, index: int, draw: int, size: int) -> NDArray[np.float32]:
    """Standard normal noise of one image.

    Args:
        seed: in [0, 2⁶⁴).
        index: the image's number under this seed, in [0, 2⁶⁴).
        draw: 0 for x_T, k + 1 for row k, in [0, 2³²).
        size: how many values; position i is the same whatever the size.

    Returns:
        (size,) float32.

    Raises:
        ConfigurationError: seed, index or draw out of range.
    """
    for name, value, bits in (("seed", seed, 64), ("index", index, 64), ("draw", draw, 32)):
        if not 0 <= value < 2**bits:
            raise ConfigurationError(f"{name} must lie in [0, 2^{bits}); got {value}.")
    out = np.empty((1, size), np.float32)
    fill_noise(
        out,
        np.array([seed], np.uint64),
        np.array([index], np.uint64),
        np.array([draw], np.uint32),
    )
    values: NDArray[np.float32] = out[0]
    return values


def fill_noise(
    out: NDArray[np.float32],
    seeds: NDArray[np.uint64],
    indices: NDArray[np.uint64],
    draws: NDArray[np.uint32],
) -> None:
    """Fill each row with the noise of one image.

    Args:
        out: (lanes, size) float32, overwritten.
        seeds: (lanes,) uint64.
        indices: (lanes,) uint64.
        draws: (lanes,) uint32.
    """
    lanes, size = out.shape
    quads = -(-size // 4)
    step = max(1, _CHUNK_QUADS // max(lanes, 1))
    low, high = np.uint64(0xFFFFFFFF), np.uint64(32)
    key = ((seeds & low).astype(np.uint32)[:, None], (seeds >> high).astype(np.uint32)[:, None])
    counter = (
        draws.astype(np.uint32)[:, None],
        (indices & low).astype(np.uint32)[:, None],
        (indices >> high).astype(np.uint32)[:, None],
    )
    for start in range(0, quads, step):
        quad = np.arange(start, min(start + step, quads), dtype=np.uint32)[None, :]
        words = philox4x32((quad, *counter), key)
        normals = np.empty((lanes, quad.size, 4), np.float32)
        normals[..., 0], normals[..., 1] = _box_muller(words[0], words[1])
        normals[..., 2], normals[..., 3] = _box_muller(words[2], words[3])
        here = slice(4 * start, min(4 * (start + quad.size), size))
        out[:, here] = normals.reshape(lanes, -1)[:, : here.stop - here.start]


def philox4x32(
    counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]
) -> tuple[Words, Words, Words, Words]:
    """Ten rounds of Philox4x32 over broadcast arrays of counters and keys.

    Args:
        counter: four uint32 arrays that broadcast together.
        key: two uint32 arrays that broadcast with them.

    Returns:
        Four uint32 arrays of the common shape.
    """
    c0, c1, c2, c3 = np.broadcast_arrays(*counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        low0, high0 = _multiply(c0, _MULTIPLIERS[0])
        low1, high1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _WEYL[0], k1 + _WEYL[1]
    return c0, c1, c2, c3


def _multiply(word: Words, multiplier: np.uint64) -> tuple[Words, Words]:
    """The low and high halves of a 32 × 32 bit product."""
    product = word.astype(np.uint64) * multiplier
    return product.astype(np.uint32), (product >> np.uint64(32)).astype(np.uint32)


def _box_muller(a: Words, b: Words) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Two independent standard normals from two words."""
    # an odd multiple of 2⁻²⁴: never 0, never 1, exact in float32
    uniform = ((a >> np.uint32(8)) | np.uint32(1)).astype(np.float32) * np.float32(2.0**-24)
    radius = np.sqrt(np.float32(-2) * log_unit(uniform))
    sine, cosine = sincos_turn(b >> np.uint32(8))
    return radius * cosine, radius * sine
