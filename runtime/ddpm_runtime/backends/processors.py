"""How many threads are useful: the affinity mask and the container's quota, whichever is less."""

from __future__ import annotations

import math
import os
from pathlib import Path

__all__ = ["usable_processors"]

_CONTROL_GROUPS = Path("/sys/fs/cgroup")


def usable_processors(control_groups: Path = _CONTROL_GROUPS) -> int:
    """Processors this process may use, ≥ 1.

    More threads than this wait for one another: a network's operators are as slow as the thread
    that was descheduled. ``os.cpu_count()`` sees the whole host, from inside a container too.

    Args:
        control_groups: where the kernel shows the limits of this container.
    """
    if hasattr(os, "sched_getaffinity"):
        processors = len(os.sched_getaffinity(0))
    else:
        processors = os.cpu_count() or 1
    quota = _quota(control_groups)
    return processors if quota is None else max(1, min(processors, math.ceil(quota)))


def _quota(control_groups: Path) -> float | None:
    """Processors' worth of time that the container may use; None means no limit is known."""
    try:  # version 2: "max 100000" or "150000 100000"
        quota, period = (control_groups / "cpu.max").read_text().split()
        return None if quota == "max" else float(quota) / float(period)
    except (OSError, ValueError):
        pass
    try:  # version 1: −1 is no limit
        quota = (control_groups / "cpu" / "cpu.cfs_quota_us").read_text()
        period = (control_groups / "cpu" / "cpu.cfs_period_us").read_text()
        return None if float(quota) <= 0 else float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
