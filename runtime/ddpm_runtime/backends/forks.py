"""What a forked child must never destroy.

A fork copies the objects of an inference library and not the threads that their destructors wait
for. So in a child they are kept for ever: not even its garbage collector may destroy them.
"""

from __future__ import annotations

import os
from typing import Any, TypeVar
from weakref import WeakSet

__all__ = ["kept_in_children"]

Kept = TypeVar("Kept")

_alive: WeakSet[Any] = WeakSet()
_kept: list[Any] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _kept.extend(_alive))


def kept_in_children(one: Kept) -> Kept:
    """The same object, which no child forked from here will destroy."""
    _alive.add(one)
    return one
