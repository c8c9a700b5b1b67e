"""Timing that can be trusted: warmed up, interleaved, raw samples kept.

Everything that is to be compared is run in turn, round after round, so that what the machine does
meanwhile (another process, a lower clock) falls on all alike. Each round also times a fixed piece
of NumPy work, the *control*: it tells a slower machine from slower code.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["CONTROL", "SETTLE_S", "Timed", "interleave", "ratio", "summarise"]

CONTROL = "control"
SETTLE_S = 0.25  # OpenMP and ONNX Runtime threads wait actively for up to a fifth of a second

_WAKING_S = 0.05
_PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, kw_only=True)
class Timed:
    """What ``interleave`` measured.

    Args:
        samples_ms: milliseconds of each call, by name, in order of rounds; ``CONTROL`` too.
        rounds: calls of each.
        warm_up: calls of each before the first that counts.
    """

    samples_ms: dict[str, list[float]]
    rounds: int
    warm_up: int


def interleave(
    cases: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    warm_up: int = 3,
    budget_s: float = float("inf"),
    settle_s: float = 0.0,
    on_round: Callable[[], Any] = lambda: None,
) -> Timed:
    """Call every case once a round, each round in another order: nobody always comes after X.

    Args:
        cases: what to time, by name.
        rounds: at most so many.
        warm_up: calls of each that are not counted: compilation, caches, page faults.
        budget_s: begin no round after this many seconds; three are always made.
        settle_s: before each case, wait so long, when positive: another library's threads stop
            spinning. Then call it uncounted until it finds its own data in the caches and the
            processors, which slept, awake.
        on_round: progress.
    """
    everything = {**cases, CONTROL: _control()}
    for call in everything.values():
        for _ in range(warm_up):
            call()
    samples: dict[str, list[float]] = {name: [] for name in everything}
    shuffle = np.random.default_rng(0)
    end = time.perf_counter() + budget_s
    done = 0
    while done < rounds and (done < 3 or time.perf_counter() < end):
        for name in shuffle.permutation(list(everything)):
            call = everything[name]
            if settle_s > 0:
                time.sleep(settle_s)
                _wake(call)
            began = time.perf_counter()
            call()
            samples[name].append(1e3 * (time.perf_counter() - began))
        done += 1
        on_round()
    return Timed(samples_ms=samples, rounds=done, warm_up=warm_up)


def _wake(call: Callable[[], Any]) -> None:
    """Call once, and again for a while."""
    end = time.perf_counter() + _WAKING_S
    call()
    while time.perf_counter() < end:
        call()


def summarise(samples: list[float]) -> dict[str, float]:
    """Percentiles, least, mean and median absolute deviation, in the unit of the samples."""
    values = np.asarray(samples, np.float64)
    middle = float(np.median(values))
    found = {f"p{p}": float(np.percentile(values, p)) for p in _PERCENTILES}
    return {
        "n": float(len(values)),
        "min": float(values.min()),
        "mean": float(values.mean()),
        "mad": float(np.median(np.abs(values - middle))),
        **found,
    }


def ratio(slower: list[float], faster: list[float]) -> dict[str, float]:
    """How many times longer one takes, round by round: median, 5th and 95th percentile.

    Args:
        slower: samples of one case.
        faster: samples of another in the same rounds.
    """
    rounds = np.asarray(slower, np.float64) / np.asarray(faster, np.float64)
    low, middle, high = np.percentile(rounds, (5, 50, 95))
    return {"p50": float(middle), "p5": float(low), "p95": float(high)}


def _control() -> Callable[[], Any]:
    """Fixed matrix products, long enough for the clock and short beside a network.

    So small that NumPy's library gives them one thread: others would wait actively for more of it,
    and slow the case that comes next.
    """
    matrices = np.random.default_rng(0).standard_normal((256, 48, 48), np.float32)
    out = np.empty_like(matrices)

    def work() -> None:
        for _ in range(4):
            np.matmul(matrices, matrices, out=out)

    return work
