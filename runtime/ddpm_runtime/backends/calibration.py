"""Which backend is fastest on this machine: measured for about a second, once, and remembered.

Only backends that compute the bundle's own precision are compared: a choice of speed must not be a
choice of numbers. The first is kept unless another saves at least a tenth, so that noise does not
decide, and the verdict is cached, so that the next process takes the same one.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Mapping
from typing import Any

from ..bundle import Bundle
from ..errors import BackendError
from .base import Backend, NetworkBinding
from .processors import usable_processors
from .user_cache import UserCache

__all__ = ["fastest", "is_installed", "time_rows"]

_ROWS = (1, 8)  # one image, and a batch
_BUDGET_S = 0.25  # for each backend and number of rows
_MOST_TRIES = 50
_MARGIN = 0.9


def fastest(
    bundle: Bundle,
    openers: Mapping[str, Callable[..., Backend]],
    options: Mapping[str, Any],
    cache: UserCache | None = None,
) -> tuple[Backend, str]:
    """Open the backend that evaluates this bundle's network fastest here.

    Args:
        bundle: the bundle.
        openers: backends by name, the preferred one first.
        options: given to the opener.
        cache: verdicts; None means the user's.

    Returns:
        The backend, and what was measured.

    Raises:
        BackendUnavailableError: the preferred one is not installed, nor another.
        BackendError, NetworkMismatchError: see the backend.
    """
    preferred, *others = openers
    installed = [name for name in openers if is_installed(name)]
    if len(installed) < 2:
        name = (installed or [preferred])[0]
        missing = ", ".join(other for other in others if other not in installed)
        reason = f"automatic: {missing} is not installed" if missing else "automatic"
        return openers[name](bundle, **options), reason
    cache = cache or UserCache()
    key = (
        bundle.manifest.files["network.onnx"].sha256,
        *(_version(name) for name in installed),
        options.get("threads") or usable_processors(),
    )
    known = cache.load("calibration", *key)
    if known is not None:
        name, _, reason = known.decode().partition("\n")
        if name in openers:
            return openers[name](bundle, **options), f"{reason}, measured before"
    opened, seconds = _measure(bundle, openers, options, installed)
    chosen = _decide(seconds)
    reason = "automatic: " + ", ".join(
        f"{name} {' / '.join(f'{1e3 * second:.1f}' for second in seconds[name])} ms"
        for name in seconds
    )
    reason += f" for {' / '.join(map(str, _ROWS))} images a step"
    cache.store("calibration", *key, content=f"{chosen}\n{reason}".encode())
    for name, backend in opened.items():
        if name != chosen:
            backend.close()
    return opened[chosen], reason


def time_rows(binding: NetworkBinding, rows: int, budget_s: float) -> float:
    """Least seconds of one evaluation: what the network takes when nothing else runs.

    Args:
        binding: with at least ``rows`` rows.
        rows: evaluated together.
        budget_s: keep trying for this long; three times at least, fifty at most.
    """
    binding.run(rows)
    best, end, tries = float("inf"), time.perf_counter() + budget_s, 0
    while tries < 3 or (tries < _MOST_TRIES and time.perf_counter() < end):
        began = time.perf_counter()
        binding.run(rows)
        best = min(best, time.perf_counter() - began)
        tries += 1
    return best


def _measure(
    bundle: Bundle,
    openers: Mapping[str, Callable[..., Backend]],
    options: Mapping[str, Any],
    names: list[str],
) -> tuple[dict[str, Backend], dict[str, list[float]]]:
    """Open each and time it; one that cannot load the network is left out, unless all cannot."""
    opened: dict[str, Backend] = {}
    seconds: dict[str, list[float]] = {}
    refusals: list[BackendError] = []
    for name in names:
        try:
            backend = openers[name](bundle, **options)
            timed = [time_rows(backend.allocate(rows), rows, _BUDGET_S) for rows in _ROWS]
        except BackendError as error:
            refusals.append(error)
            continue
        opened[name], seconds[name] = backend, timed
    if not opened:
        raise refusals[0]
    return opened, seconds


def _decide(seconds: Mapping[str, list[float]]) -> str:
    """The first, unless another's time over all numbers of rows is a tenth less."""
    preferred = next(iter(seconds))
    chosen, best = preferred, 1.0
    for name, timed in seconds.items():
        ratios = [mine / first for mine, first in zip(timed, seconds[preferred], strict=True)]
        ratio = (ratios[0] * ratios[1]) ** 0.5
        if ratio < min(_MARGIN, best):
            chosen, best = name, ratio
    return chosen


def is_installed(module: str) -> bool:
    """Whether a library can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _version(name: str) -> str:
    from importlib import metadata

    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return name
