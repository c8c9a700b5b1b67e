"""ddpm_bench/kernel_distance.py against double loops and exact expectations."""

from __future__ import annotations

import numpy as np
import pytest

from ddpm_bench.kernel_distance import kernel_distance, squared_mmd
from ddpm_runtime.errors import ConfigurationError


def kernel(x, y) -> float:
    return (float(np.dot(x, y)) / len(x) + 1.0) ** 3


def double_loop(one, other) -> float:
    n, m = len(one), len(other)
    same = sum(kernel(one[i], one[j]) for i in range(n) for j in range(n) if i != j)
    rest = sum(kernel(other[i], other[j]) for i in range(m) for j in range(m) if i != j)
    cross = sum(kernel(x, y) for x in one for y in other)
    return same / (n * (n - 1)) + rest / (m * (m - 1)) - 2 * cross / (n * m)


def test_the_estimate_equals_a_double_loop():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(9, 5)), rng.normal(size=(7, 5)) + 0.5
    assert squared_mmd(one, other) == pytest.approx(double_loop(one, other), rel=1e-12)


def test_the_estimate_is_unbiased_at_four_images():
    # two laws on a few points, so that the true MMD² is a finite sum
    rng = np.random.default_rng(1)
    points, others = rng.normal(size=(3, 2)), rng.normal(size=(4, 2)) + 0.5
    exact = (
        np.mean([[kernel(a, b) for a in points] for b in points])
        + np.mean([[kernel(a, b) for a in others] for b in others])
        - 2 * np.mean([[kernel(a, b) for a in points] for b in others])
    )
    estimates = [
        squared_mmd(points[rng.integers(3, size=4)], others[rng.integers(4, size=5)])
        for _ in range(4000)
    ]
    error = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates) - exact) < 4 * error
    assert error < 0.05 * exact  # the test would see a bias of a fifth


def test_the_same_law_scores_zero_on_average_and_dips_below():
    rng = np.random.default_rng(2)
    estimates = [squared_mmd(*rng.normal(size=(2, 20, 3))) for _ in range(500)]
    assert abs(np.mean(estimates)) < 4 * np.std(estimates) / np.sqrt(500)
    assert min(estimates) < 0


def test_blocks_are_the_same_for_the_same_seed_only():
    rng = np.random.default_rng(3)
    one, other = rng.normal(size=(2, 300, 4))
    settings = {"blocks": 5, "block_size": 50}
    first = kernel_distance(one, other, seed=0, **settings)
    assert kernel_distance(one, other, seed=0, **settings) == first
    assert kernel_distance(one, other, seed=1, **settings) != first


def test_one_block_of_everything_is_the_whole_estimate():
    rng = np.random.default_rng(4)
    one, other = rng.normal(size=(2, 40, 3))
    found = kernel_distance(one, other, blocks=1, block_size=1000)
    assert found.mean == pytest.approx(squared_mmd(one, other), rel=1e-12)
    assert (found.block_size, found.deviation) == (40, None)


def test_blocks_agree_with_the_whole_within_their_spread():
    rng = np.random.default_rng(5)
    one, other = rng.normal(size=(2000, 6)), rng.normal(size=(2000, 6)) + 0.1
    found = kernel_distance(one, other, blocks=100, block_size=200)
    whole = squared_mmd(one, other)
    assert abs(found.mean - whole) < 4 * found.deviation / np.sqrt(100)


@pytest.mark.parametrize(
    ("one", "other"), [((1, 3), (5, 3)), ((5, 3), (1, 3)), ((5, 3), (5, 4)), ((5,), (5,))]
)
def test_sets_that_cannot_be_compared_are_refused(one, other):
    with pytest.raises(ConfigurationError, match="at least 2 images each"):
        squared_mmd(np.zeros(one), np.zeros(other))
