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

_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
_WEYL = np.array([0x9E3779B9, 0xBB67AE85], np.uint32)
_32 = np.uint64(32)
_ROUNDS = 10
_CHUNK_QUADS = 1 << 12  # scratch arrays that stay in the second-level cache

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
    key = _halves(seeds)[..., None]
    index = _halves(indices)[..., None]
    for start in range(0, quads, step):
        quad = np.arange(start, min(start + step, quads), dtype=np.uint32)
        counter = np.empty((4, lanes, quad.size), np.uint32)
        counter[0], counter[1], counter[2:] = quad, draws[:, None], index
        words = philox4x32(counter, key)
        cosines, sines = _box_muller(words[0::2], words[1::2])
        normals = np.empty((lanes, quad.size, 4), np.float32)
        normals[..., 0::2] = np.moveaxis(cosines, 0, -1)
        normals[..., 1::2] = np.moveaxis(sines, 0, -1)
        here = slice(4 * start, min(4 * (start + quad.size), size))
        out[:, here] = normals.reshape(lanes, -1)[:, : here.stop - here.start]


def philox4x32(counter: Words, key: Words) -> Words:
    """Ten rounds of Philox4x32.

    Words 0 and 2 are multiplied, words 1 and 3 are mixed in: both pairs go through each operation
    together, because on the few thousand words of an image NumPy's time is its number of calls.

    Args:
        counter: (4, ...) uint32.
        key: (2, ...) uint32 that broadcasts with a counter's pairs.

    Returns:
        (4, ...) uint32.
    """
    multiplied, mixed = counter[0::2], counter[1::2]
    multipliers = _MULTIPLIERS.reshape(2, *[1] * (counter.ndim - 1))
    weyl = _WEYL.reshape(2, *[1] * (key.ndim - 1))
    for _ in range(_ROUNDS):
        product = multiplied.astype(np.uint64)
        product *= multipliers
        low, high = product.astype(np.uint32), (product >> _32).astype(np.uint32)
        multiplied, mixed = high[::-1] ^ mixed ^ key, low[::-1]
        key = key + weyl
    words = np.empty_like(counter)
    words[0::2], words[1::2] = multiplied, mixed
    return words


def _halves(numbers: NDArray[np.uint64]) -> Words:
    """(2, n): the low and high 32 bits of 64-bit numbers."""
    return np.stack([numbers.astype(np.uint32), (numbers >> _32).astype(np.uint32)])


def _box_muller(a: Words, b: Words) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Two independent standard normals from two words."""
    # an odd multiple of 2⁻²⁴: never 0, never 1, exact in float32
    uniform = ((a >> np.uint32(8)) | np.uint32(1)).astype(np.float32) * np.float32(2.0**-24)
    radius = np.sqrt(np.float32(-2) * log_unit(uniform))
    sine, cosine = sincos_turn(b >> np.uint32(8))
    return radius * cosine, radius * sine
