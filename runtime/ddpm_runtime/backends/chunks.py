"""Rows in chunks of a few fixed sizes: powers of two, each compiled once.

A library that compiles for one static shape is faster than one that takes any shape, and chunks
that fit the processor's cache are faster than one large batch. Which chunk a row falls into must
not change its bits; the backend that uses this says how it makes sure.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Chunk", "chunks"]


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Rows [start, start + size) of the buffers, evaluated together.

    Args:
        start: first row.
        size: rows evaluated, a power of two; the last of them may be padding.
    """

    start: int
    size: int


def chunks(rows: int, *, smallest: int, largest: int) -> tuple[Chunk, ...]:
    """Cover ``rows`` rows; no more than a quarter of a chunk over ``smallest`` is padding.

    Args:
        rows: ≥ 1.
        smallest: a power of two; fewer rows are padded to it.
        largest: a power of two ≥ smallest.
    """
    found, start = [], 0
    while start < rows:
        left = rows - start
        size = smallest
        while size < largest and size < left:
            size *= 2
        if size > smallest and 4 * left < 3 * size:
            size //= 2
        found.append(Chunk(start=start, size=size))
        start += size
    return tuple(found)
