"""KID: the kernel distance of two sets of features, unbiased at every n (NumPy).

    k(x, y) = (xᵀy / D + 1)³
    MMD²    = mean_{i≠j} k(x_i, x_j) + mean_{i≠j} k(y_i, y_j) − 2·mean_{i,j} k(x_i, y_j)

Unlike a Fréchet distance its expectation does not depend on n, so it may be compared between
numbers of images; it may come out slightly negative when the sets are alike.

Sources: Bińkowski et al., "Demystifying MMD GANs", arXiv 1801.01401 §4 (this kernel, on features
of a classifier); Gretton et al., JMLR 13 (2012) eq. 3 (the unbiased estimator).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddpm_runtime.errors import ConfigurationError

__all__ = ["KernelDistance", "kernel_distance", "squared_mmd"]

Array = NDArray[np.float64]
Features = NDArray[np.floating]


@dataclass(frozen=True, kw_only=True)
class KernelDistance:
    """A KID with its spread.

    Args:
        mean: mean of MMD² over blocks.
        deviation: standard deviation of MMD² over blocks (of one block, not of the mean); None
            for one block.
        blocks: how many.
        block_size: rows drawn from each set for a block.
    """

    mean: float
    deviation: float | None
    blocks: int
    block_size: int


def kernel_distance(
    one: Features, other: Features, *, blocks: int = 50, block_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """KID over random blocks, each drawn without replacement from each set.

    Args:
        one: (n, D) features.
        other: (m, D) features.
        blocks: ≥ 1.
        block_size: rows of each set in a block; min(n, m) when that is less.
        seed: decides the blocks.

    Raises:
        ConfigurationError: fewer than two rows, or different D.
    """
    size = min(block_size, len(one), len(other))
    rng = np.random.default_rng(seed)
    values = [
        squared_mmd(
            one[rng.choice(len(one), size, replace=False)],
            other[rng.choice(len(other), size, replace=False)],
        )
        for _ in range(blocks)
    ]
    deviation = float(np.std(values, ddof=1)) if blocks > 1 else None
    return KernelDistance(
        mean=float(np.mean(values)), deviation=deviation, blocks=blocks, block_size=size
    )


def squared_mmd(one: Features, other: Features) -> float:
    """The unbiased MMD² of the module's formula, in float64.

    Args:
        one: (n, D), n ≥ 2.
        other: (m, D), m ≥ 2.

    Raises:
        ConfigurationError: fewer than two rows, or different D.
    """
    x, y = np.asarray(one, np.float64), np.asarray(other, np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ConfigurationError(
            "a kernel distance needs features (n, D) and (m, D) of at least 2 images each; "
            f"got {x.shape} and {y.shape}."
        )
    return (
        _mean_off_diagonal(_kernel(x, x))
        + _mean_off_diagonal(_kernel(y, y))
        - 2.0 * float(_kernel(x, y).mean())
    )


def _kernel(x: Array, y: Array) -> Array:
    values: Array = (x @ y.T / x.shape[1] + 1.0) ** 3
    return values


def _mean_off_diagonal(kernel: Array) -> float:
    n = len(kernel)
    return float((kernel.sum() - np.trace(kernel)) / (n * (n - 1)))
