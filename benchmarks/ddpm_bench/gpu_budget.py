"""A time budget that is kept: what does not fit is left out, and named."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Budget"]


class Budget:
    """Seconds to spend, shared out over groups of cases.

    Args:
        seconds: in all, from now.
        groups: how many groups there will be; each is kept ``reserve_s`` for until its turn.
        reserve_s: what a group needs for its quick cases.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        seconds: float,
        *,
        groups: int,
        reserve_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._end = clock() + seconds
        self._groups_after = groups
        self._reserve_s = reserve_s
        self._took_s: dict[str, float] = {}

    @property
    def left_s(self) -> float:
        """Until the end; below 0 after it."""
        return self._end - self._clock()

    @property
    def free_s(self) -> float:
        """What this group may take without touching the reserve of those after it."""
        return self.left_s - self._reserve_s * self._groups_after

    @property
    def share_s(self) -> float:
        """An even share of what is left: for rounds of measuring."""
        return min(self.left_s, max(self.free_s / (self._groups_after + 1), self._reserve_s / 2))

    def next_group(self) -> None:
        """The next group begins."""
        self._groups_after -= 1

    def refusal(self, kind: str, guess_s: float) -> str:
        """Why something of this kind must not be begun; empty when it may.

        Args:
            kind: what is alike: the longest it has taken is expected again.
            guess_s: expected while nothing of this kind has been done.
        """
        expected = self._took_s.get(kind, guess_s)
        if expected <= self.free_s:
            return ""
        return f"about {expected:.0f} s to get ready, {max(0.0, self.free_s):.0f} s left for it"

    def took(self, kind: str, seconds: float) -> None:
        """Remember how long something took."""
        self._took_s[kind] = max(seconds, self._took_s.get(kind, 0.0))
