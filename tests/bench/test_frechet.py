"""ddpm_bench/frechet.py against closed forms and against another route to the same number."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from ddpm_bench.frechet import GaussianFit, frechet_distance, gaussian_fit
from ddpm_runtime.errors import ConfigurationError


def random_fit(rng, dimensions: int, rank: int | None = None) -> GaussianFit:
    factor = rng.normal(size=(dimensions, rank or dimensions))
    return GaussianFit(mean=rng.normal(size=dimensions), covariance=factor @ factor.T)


def test_axis_aligned_gaussians_have_the_textbook_distance():
    rng = np.random.default_rng(0)
    deviations = rng.uniform(0.1, 3, (2, 7))
    means = rng.normal(size=(2, 7))
    one, other = (
        GaussianFit(mean=mean, covariance=np.diag(deviation**2))
        for mean, deviation in zip(means, deviations, strict=True)
    )
    # independent coordinates: squared 2-Wasserstein distances of 1-D Gaussians add up
    expected = ((means[0] - means[1]) ** 2 + (deviations[0] - deviations[1]) ** 2).sum()
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-12)


def test_correlated_gaussians_agree_with_the_square_root_of_the_plain_product():
    rng = np.random.default_rng(1)
    for dimensions in (1, 2, 5, 40):
        one, other = random_fit(rng, dimensions), random_fit(rng, dimensions)
        root = scipy.linalg.sqrtm(one.covariance @ other.covariance)
        expected = (
            np.sum((one.mean - other.mean) ** 2)
            + np.trace(one.covariance)
            + np.trace(other.covariance)
            - 2 * np.trace(root).real
        )
        assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-8)


def test_a_gaussian_is_at_distance_zero_from_itself():
    fit = random_fit(np.random.default_rng(2), 30)
    assert abs(frechet_distance(fit, fit)) < 1e-10 * np.trace(fit.covariance)


def test_the_distance_is_symmetric():
    rng = np.random.default_rng(3)
    one, other = random_fit(rng, 12), random_fit(rng, 12, rank=4)
    # eight eigenvalues of the product are 0 up to rounding, 1e-16 of its norm of some 1e3; their
    # square roots are some 3e-7
    assert frechet_distance(one, other) == pytest.approx(frechet_distance(other, one), abs=1e-5)


def test_singular_covariances_in_orthogonal_planes_need_no_regularisation():
    rng = np.random.default_rng(4)
    basis, _ = np.linalg.qr(rng.normal(size=(10, 10)))
    one = GaussianFit(mean=np.zeros(10), covariance=basis[:, :5] @ basis[:, :5].T)
    other = GaussianFit(mean=np.zeros(10), covariance=4 * basis[:, 5:] @ basis[:, 5:].T)
    # nothing can be coupled: the cross term vanishes and the traces 5 and 20 remain; rounding of
    # 1e-16 in an eigenvalue becomes 1e-8 under its square root, ten times over
    assert frechet_distance(one, other) == pytest.approx(25.0, abs=1e-6)


def test_a_rotation_of_feature_space_changes_nothing_and_a_scaling_squares():
    rng = np.random.default_rng(5)
    one, other = rng.normal(size=(200, 6)), rng.normal(size=(300, 6)) @ rng.normal(size=(6, 6)) + 1
    rotation, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    plain = frechet_distance(gaussian_fit(one), gaussian_fit(other))
    turned = frechet_distance(gaussian_fit(one @ rotation), gaussian_fit(other @ rotation))
    scaled = frechet_distance(gaussian_fit(3 * one), gaussian_fit(3 * other))
    assert turned == pytest.approx(plain, rel=1e-9)
    assert scaled == pytest.approx(9 * plain, rel=1e-9)


def test_the_fit_has_the_unbiased_covariance():
    rows = np.random.default_rng(6).normal(size=(50, 4)).astype(np.float32)
    fit = gaussian_fit(rows)
    np.testing.assert_allclose(fit.mean, rows.mean(0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(
        fit.covariance, np.cov(rows.astype(np.float64), rowvar=False), rtol=1e-10, atol=1e-12
    )


def test_a_large_offset_costs_no_precision_because_sums_are_float64():
    rows = np.random.default_rng(7).normal(size=(1000, 3))
    near, far = gaussian_fit(rows), gaussian_fit(rows + 1e4)
    np.testing.assert_allclose(far.covariance, near.covariance, atol=1e-9)


@pytest.mark.parametrize("features", [np.zeros((1, 4)), np.zeros(4)])
def test_too_few_images_are_refused(features):
    with pytest.raises(ConfigurationError, match="n ≥ 2 images"):
        gaussian_fit(features)


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(ConfigurationError, match="NaN or infinity"):
        gaussian_fit(np.array([[0.0, np.nan], [1.0, 1.0]]))


def test_features_of_two_judges_are_refused():
    rng = np.random.default_rng(8)
    with pytest.raises(ConfigurationError, match="one judge"):
        frechet_distance(random_fit(rng, 3), random_fit(rng, 4))
