"""Change or noise? Two sets of raw samples of the same thing, from two reports.

Interference only ever adds time, so what is compared is the lower quartile: what the code takes
when the machine is quiet. A case has *changed* when all of this holds:

1. the ratio of the lower quartiles is further from 1 than ``margin``;
2. so is that ratio after dividing by the ratio of the controls, the fixed work that was timed in
   the same rounds: otherwise it is the machine that changed;
3. a confidence interval of the ratio leaves 1 out. It comes from a moving-block bootstrap, because
   neighbouring samples are alike, at a level divided by the number of cases (Bonferroni).

Source: Künsch, Ann. Statist. 17 (1989), for the block bootstrap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .timing import CONTROL

__all__ = ["Verdict", "compare_cases", "compare_samples"]

MARGIN = 0.05
LEVEL = 0.01

_QUANTILE = 25
_RESAMPLES = 4000
_FEWEST = 16  # fewer are one moment of the machine, whatever their spread

Samples = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One case, before and after.

    Args:
        case_id: which.
        ratio: after over before, lower quartiles; above 1 is slower.
        interval: its confidence interval.
        control_ratio: the same of the control; None when a report has none.
        outcome: "slower", "faster", "no change", or "too few samples".
    """

    case_id: str
    ratio: float
    interval: tuple[float, float]
    control_ratio: float | None
    outcome: str


def compare_cases(
    before: dict[str, Any], after: dict[str, Any], *, margin: float = MARGIN, level: float = LEVEL
) -> list[Verdict]:
    """Compare every case that two reports share, by its id.

    Args:
        before: a report with timed cases.
        after: another of the same kind.
        margin: a smaller change is not called one.
        level: chance of a false alarm over all cases, were the samples independent of their run.
    """
    old, new = _timed(before), _timed(after)
    shared = [case_id for case_id in old if case_id in new]
    return [
        compare_samples(
            case_id,
            old[case_id]["samples"],
            new[case_id]["samples"],
            control_ratio=_control_ratio(old[case_id], new[case_id]),
            margin=margin,
            level=level / max(1, len(shared)),
        )
        for case_id in shared
    ]


def compare_samples(
    case_id: str,
    before: list[float],
    after: list[float],
    *,
    control_ratio: float | None = None,
    margin: float = MARGIN,
    level: float = LEVEL,
) -> Verdict:
    """Compare two sets of samples; see the top of this file.

    Args:
        case_id: for the verdict.
        before: samples, in the order in which they were taken.
        after: likewise.
        control_ratio: how much longer the control took.
        margin: a smaller change is not called one.
        level: one minus the confidence of the interval.
    """
    old, new = np.asarray(before, np.float64), np.asarray(after, np.float64)
    found = float(_location(new) / _location(old))
    random = np.random.default_rng(0)
    resampled = _resample(new, random) / _resample(old, random)
    low, high = np.percentile(resampled, (50 * level, 100 - 50 * level))
    outcome = "no change"
    if min(len(old), len(new)) < _FEWEST:
        outcome = "too few samples"
    elif _outside(found, control_ratio, margin) and not low <= 1.0 <= high:
        outcome = "slower" if found > 1 else "faster"
    return Verdict(
        case_id=case_id,
        ratio=found,
        interval=(float(low), float(high)),
        control_ratio=control_ratio,
        outcome=outcome,
    )


def _outside(found: float, control_ratio: float | None, margin: float) -> bool:
    """Whether the ratio leaves the margin, with and without the control, on one side."""
    ratios = [found] if control_ratio is None else [found, found / control_ratio]
    return all(one > 1 + margin for one in ratios) or all(one < 1 / (1 + margin) for one in ratios)


def _location(samples: Samples) -> Any:
    return np.percentile(samples, _QUANTILE, axis=-1)


def _resample(samples: Samples, random: np.random.Generator) -> Samples:
    """Lower quartiles of moving-block bootstrap samples; a block is about the square root."""
    n = len(samples)
    block = max(1, round(n**0.5))
    starts = random.integers(0, n - block + 1, (_RESAMPLES, -(-n // block)))
    indices = (starts[..., None] + np.arange(block)).reshape(_RESAMPLES, -1)[:, :n]
    found: Samples = _location(samples[indices])
    return found


def _timed(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {case["id"]: case for case in report["cases"] if case.get("samples")}


def _control_ratio(old: dict[str, Any], new: dict[str, Any]) -> float | None:
    if not (old.get(CONTROL) and new.get(CONTROL)):
        return None
    return float(_location(np.asarray(new[CONTROL])) / _location(np.asarray(old[CONTROL])))
