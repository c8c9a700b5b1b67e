"""Which timesteps are visited: definitions, order, ends, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_runtime.errors import ConfigurationError
from ddpm_runtime.schedule import SPACINGS, karras_sigmas, make_schedule, timestep_spacing


@given(
    T=st.integers(1, 300),
    data=st.data(),
    name=st.sampled_from(sorted(SPACINGS)),
    rescaled=st.booleans(),
)
def test_timesteps_fall_strictly_within_the_trained_range(T, data, name, rescaled):
    S = data.draw(st.integers(1, T))
    schedule = make_schedule("linear", T, rescale_zero_terminal_snr=rescaled and T > 1)
    t = timestep_spacing(name, T, S, schedule)
    assert t.shape == (S,)
    assert t.dtype == np.float64
    assert (np.diff(t) < 0).all()
    assert t[0] <= T - 1
    assert t[-1] >= 0
    if name in {"leading", "trailing", "linspace", "quadratic"}:
        assert (t == np.round(t)).all()
    if name in {"trailing", "linspace", "karras", "log_snr"}:
        assert t[0] == T - 1
    if name in {"leading", "quadratic", "karras", "log_snr", "linspace"} and S > 1:
        assert t[-1] == 0


def test_the_worked_example_of_lin_et_al():
    """Table 2 of arXiv 2305.08891: T = 1000, S = 10 (counted from 1 there)."""
    assert (timestep_spacing("leading", 1000, 10) + 1).tolist() == list(range(901, 0, -100))
    assert (timestep_spacing("trailing", 1000, 10) + 1).tolist() == list(range(1000, 0, -100))
    found = (timestep_spacing("linspace", 1000, 10) + 1).tolist()
    assert found == [1000, 889, 778, 667, 556, 445, 334, 223, 112, 1]


def test_quadratic_is_the_authors_sequence():
    """ddim/runners/diffusion.py: int(s) for s in np.linspace(0, np.sqrt(T * 0.8), S) ** 2."""
    for steps in (10, 20, 50, 100):
        authors = [int(s) for s in np.linspace(0, np.sqrt(1000 * 0.8), steps) ** 2]
        found = timestep_spacing("quadratic", 1000, steps)[::-1]
        if len(set(authors)) == steps:
            assert found.tolist() == authors
        else:  # theirs repeats timesteps near 0; ours takes the next free one
            assert (found >= authors).all()
    assert timestep_spacing("quadratic", 1000, 1).tolist() == [800.0]
    assert timestep_spacing("quadratic", 3, 3).tolist() == [2.0, 1.0, 0.0]
    assert timestep_spacing("quadratic", 4, 2).tolist() == [3.0, 0.0]
    assert timestep_spacing("quadratic", 1000, 1000).tolist() == list(range(999, -1, -1))


@pytest.mark.parametrize("name", ["trailing", "linspace", "karras", "log_snr"])
def test_a_single_step_starts_where_there_is_least_signal(name):
    assert timestep_spacing(name, 50, 1, make_schedule("linear", 50)).tolist() == [49.0]


def test_karras_spacing_has_equal_steps_of_the_seventh_root_of_sigma():
    schedule = make_schedule()
    t = timestep_spacing("karras", 1000, 15, schedule)
    a = schedule.alphas_cumprod_at(t)
    assert np.allclose(np.diff((1 / a - 1) ** (0.5 / 7), n=2), 0, atol=1e-12)


def test_log_snr_spacing_has_equal_steps_of_log_snr():
    schedule = make_schedule("cosine")
    t = timestep_spacing("log_snr", 1000, 15, schedule)
    a = schedule.alphas_cumprod_at(t)
    assert np.allclose(np.diff(np.log(1 / a - 1), n=2), 0, atol=1e-10)


@pytest.mark.parametrize("name", ["karras", "log_snr"])
def test_a_level_without_signal_takes_the_place_of_the_first(name):
    schedule = make_schedule("linear", 1000, rescale_zero_terminal_snr=True)
    t = timestep_spacing(name, 1000, 8, schedule)
    a = schedule.alphas_cumprod_at(t[1:])
    assert t[0] == 999.0
    level = np.log(1 / a - 1) if name == "log_snr" else (1 / a - 1) ** (0.5 / 7)
    largest = 1 / schedule.alphas_cumprod[998] - 1
    first = np.log(largest) if name == "log_snr" else largest ** (0.5 / 7)
    assert np.allclose(np.diff([first, *level], n=2), 0, atol=1e-10)
    assert timestep_spacing(name, 1000, 1, schedule).tolist() == [999.0]
    assert timestep_spacing(name, 1000, 2, schedule).tolist() == [999.0, 0.0]


def test_karras_sigmas_are_eq_5():
    sigmas = karras_sigmas(18)
    for i, sigma in enumerate(sigmas):
        root = 80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))
        assert sigma == pytest.approx(root**7, rel=1e-12)
    assert karras_sigmas(1).tolist() == pytest.approx([80.0])
    assert karras_sigmas(3, 1.0, 9.0, rho=1.0) == pytest.approx([9, 5, 1])
    assert karras_sigmas(3, 1.0, 9.0, rho=2.0) == pytest.approx([9, 4, 1])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((0,), "steps must be ≥ 1; got 0"),
        ((5, 0.0), "sigma_min=0.0"),
        ((5, 2.0, 1.0), "sigma_max=1.0"),
        ((5, 0.1, 1.0, 0.0), "rho=0.0"),
    ],
)
def test_impossible_karras_sigmas_are_refused(arguments, named):
    with pytest.raises(ConfigurationError, match=named):
        karras_sigmas(*arguments)


@pytest.mark.parametrize(("steps", "nearest"), [(0, 1), (-3, 1), (101, 100), (10**9, 100)])
def test_steps_outside_the_trained_range_get_the_nearest(steps, nearest):
    with pytest.raises(
        ConfigurationError,
        match=f"between 1 and 100.*got {steps}.*nearest valid choice is {nearest}",
    ):
        timestep_spacing("leading", 100, steps)


def test_unknown_spacings_get_the_nearest():
    with pytest.raises(ConfigurationError, match="Did you mean 'trailing'"):
        timestep_spacing("trailling", 100, 10)


@pytest.mark.parametrize("name", ["karras", "log_snr"])
def test_spacings_over_noise_levels_need_them(name):
    with pytest.raises(ConfigurationError, match="pass schedule="):
        timestep_spacing(name, 100, 10)
