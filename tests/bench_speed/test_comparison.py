"""Change or noise: power and false alarms on samples whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from ddpm_bench.comparison import compare_cases, compare_samples
from ddpm_bench.timing import CONTROL


def run(random, *, slower=1.0, machine=1.0, n=50):
    """Samples and controls of one run, as machines give them.

    The run as a whole is off by about one per cent; every tenth sample meets another process; and
    neighbours are alike.
    """
    drift = machine * np.exp(0.01 * random.standard_normal())
    wave = np.convolve(random.standard_normal(n + 4), np.ones(5) / 5, mode="valid")
    busy = np.where(random.random(n) < 0.1, 1 + random.exponential(1.0, n), 1.0)
    samples = 10 * slower * drift * np.exp(0.02 * wave) * busy
    control = 2 * drift * np.exp(0.02 * random.standard_normal(n)) * busy
    return samples.tolist(), control.tolist()


def verdict(random, **after):
    old, old_control = run(random)
    new, new_control = run(random, **after)
    reports = [
        {"cases": [{"id": "case", "samples": samples, CONTROL: control}]}
        for samples, control in ((old, old_control), (new, new_control))
    ]
    (found,) = compare_cases(*reports)
    return found.outcome


def test_nothing_changed_is_called_no_change():
    random = np.random.default_rng(1)
    outcomes = [verdict(random) for _ in range(200)]
    # the level is 1 %: 8 or more of 200 would have probability 1e-3
    assert sum(outcome != "no change" for outcome in outcomes) < 8


@pytest.mark.parametrize(("slower", "outcome"), [(1.10, "slower"), (1 / 1.10, "faster")])
def test_a_tenth_is_called_a_change(slower, outcome):
    random = np.random.default_rng(2)
    outcomes = [verdict(random, slower=slower) for _ in range(100)]
    assert sum(found == outcome for found in outcomes) >= 90


def test_a_slower_machine_is_not_slower_code():
    random = np.random.default_rng(3)
    outcomes = [verdict(random, machine=1.2) for _ in range(100)]
    assert sum(outcome != "no change" for outcome in outcomes) < 6


def test_a_change_within_the_margin_is_none():
    random = np.random.default_rng(4)
    assert [verdict(random, slower=1.01) for _ in range(20)].count("no change") >= 19


def test_many_cases_share_one_level():
    random = np.random.default_rng(5)
    alarms = 0
    for _ in range(20):
        reports = []
        for _ in range(2):
            cases = []
            for i in range(10):
                samples, control = run(random, n=30)
                cases.append({"id": f"case-{i}", "samples": samples, CONTROL: control})
            reports.append({"cases": cases})
        alarms += any(found.outcome != "no change" for found in compare_cases(*reports))
    assert alarms <= 3


def test_few_samples_are_said_to_be_few():
    assert compare_samples("case", [1.0] * 5, [9.0] * 5).outcome == "too few samples"


def test_identical_samples_do_not_differ():
    samples = np.random.default_rng(6).exponential(1.0, 30).tolist()
    found = compare_samples("case", samples, samples)
    assert found.ratio == 1.0
    assert found.outcome == "no change"


def test_only_shared_cases_are_compared():
    one = {"cases": [{"id": "a", "samples": [1.0] * 9}, {"id": "b", "samples": [1.0] * 9}]}
    two = {"cases": [{"id": "b", "samples": [1.0] * 9}, {"id": "c", "samples": [1.0] * 9}]}
    assert [found.case_id for found in compare_cases(one, two)] == ["b"]
