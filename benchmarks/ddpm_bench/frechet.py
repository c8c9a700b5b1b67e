"""The Fréchet distance between two sets of features, each summed up by a Gaussian (NumPy).

    d² = |μ₁ − μ₂|² + Tr Σ₁ + Tr Σ₂ − 2·Tr (Σ₁^½ Σ₂ Σ₁^½)^½

The quantity is the squared 2-Wasserstein distance of N(μ₁, Σ₁) and N(μ₂, Σ₂). Its value depends on
whose features they are, so it compares with nothing measured through another network; and an
estimate from n images is biased upwards by an amount that falls with n, so it compares only at one
n, and is printed beside what real images score at that n.

Sources: Dowson & Landau, J. Multivariate Anal. 12 (1982); use for generators: Heusel et al.,
arXiv 1706.08500 eq. 6; bias: Bińkowski et al., arXiv 1801.01401 §4.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddpm_runtime.errors import ConfigurationError

__all__ = ["GaussianFit", "frechet_distance", "gaussian_fit"]

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class GaussianFit:
    """Mean (D,) and covariance (D, D), float64."""

    mean: Array
    covariance: Array


def gaussian_fit(features: NDArray[np.floating]) -> GaussianFit:
    """Sample mean and unbiased covariance (divisor n − 1).

    Args:
        features: (n, D), n ≥ 2, any float dtype; the sums are float64.

    Raises:
        ConfigurationError: fewer than two rows, not a matrix, or not finite.
    """
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2 or len(rows) < 2:
        raise ConfigurationError(
            f"a Gaussian fit needs features (n, D) of n ≥ 2 images; got shape {rows.shape}."
        )
    if not np.isfinite(rows).all():
        raise ConfigurationError("features hold NaN or infinity; check the images.")
    mean = rows.mean(axis=0)
    centred = rows - mean
    return GaussianFit(mean=mean, covariance=centred.T @ centred / (len(rows) - 1))


def frechet_distance(one: GaussianFit, other: GaussianFit) -> float:
    """The (squared) Fréchet distance of the module's formula, ≥ 0 up to rounding.

    The usual route, the square root of the non-symmetric Σ₁Σ₂, can come out complex for nearly
    singular covariances. Here both roots are of symmetric positive semi-definite matrices, taken
    through ``eigh``; Σ₁^½ Σ₂ Σ₁^½ has the eigenvalues of Σ₁Σ₂, so the trace is the same number.
    Eigenvalues that rounding made negative are 0.

    Args:
        one: D features.
        other: D features.

    Raises:
        ConfigurationError: the fits have different D.
    """
    if one.mean.shape != other.mean.shape:
        raise ConfigurationError(
            f"the fits have {one.mean.size} and {other.mean.size} features; look at both sets "
            "with one judge."
        )
    root = _symmetric_root(one.covariance)
    product = root @ other.covariance @ root
    cross = np.sqrt(np.clip(np.linalg.eigvalsh((product + product.T) / 2), 0.0, None)).sum()
    difference = one.mean - other.mean
    traces = np.trace(one.covariance) + np.trace(other.covariance)
    return float(difference @ difference + traces - 2.0 * cross)


def _symmetric_root(covariance: Array) -> Array:
    """S with S·S = covariance, S symmetric positive semi-definite."""
    values, vectors = np.linalg.eigh(covariance)
    root: Array = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
    return root
