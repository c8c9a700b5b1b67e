"""Many rows, side by side: each thread takes some of them through the whole network.

Threads that share an operator wait for one another after every layer, and a layer of a small
network is too little work to share. So where there are rows for all, every thread has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

__all__ = ["Crew", "shares"]

Work = Callable[[], None]

_LARGEST_CHUNK = 8  # rows whose features stay in a processor's own cache


def shares(rows: int, threads: int) -> list[list[slice]] | None:
    """Which rows each thread takes, in chunks; None where some would wait long for others.

    Args:
        rows: ≥ 1.
        threads: ≥ 1.
    """
    most = -(-rows // threads)
    if 8 * most * threads > 9 * rows:
        return None
    return [_parts(share, -(-most // _LARGEST_CHUNK)) for share in _parts(slice(0, rows), threads)]


def _parts(rows: slice, count: int) -> list[slice]:
    """Rows in parts that differ by one at most; fewer where there are not enough rows."""
    total = rows.stop - rows.start
    count = min(count, total)
    edges = [rows.start + total * i // count for i in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


class Crew:
    """Threads that work beside the one that calls; they start when first needed.

    Args:
        threads: with the caller's, ≥ 1.
    """

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(max(1, threads - 1), thread_name_prefix="ddpm-rows")

    def run(self, work: Sequence[Work]) -> None:
        """Do all of it, the first in this thread; return when all is done.

        Raises:
            Exception: the first that was raised, when nothing is under way any more.
        """
        others = [self._pool.submit(one) for one in work[1:]]
        try:
            work[0]()
        finally:
            errors = [other.exception() for other in others]
        for error in errors:
            if error is not None:
                raise error

    def close(self) -> None:
        """Let the threads end. Idempotent."""
        self._pool.shutdown(wait=False)
