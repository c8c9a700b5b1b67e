"""Levels, and what the network's answer means at each of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ddpm_runtime.errors import ConfigurationError
from ddpm_runtime.samplers import compile_program
from ddpm_runtime.schedule import karras_sigmas, make_schedule
from ddpm_runtime.trajectory import PREDICTION_TYPES, discrete_trajectory, edm_trajectory
from helpers import mixture

SCHEDULE = make_schedule("linear", 100)


@pytest.mark.parametrize("prediction_type", sorted(PREDICTION_TYPES))
def test_a_perfect_answer_gives_back_the_image(prediction_type):
    """x_t = signal·x_0 + noise·ε; v = signal·ε − noise·x_0."""
    trajectory = discrete_trajectory(SCHEDULE, prediction_type, np.array([99.0, 40.5, 3.0, 0.0]))
    x_0, epsilon = 0.37, -1.21
    signal, noise = trajectory.signal[:-1], trajectory.noise[:-1]
    x_t = signal * x_0 + noise * epsilon
    m = {"epsilon": epsilon, "sample": x_0, "v_prediction": signal * epsilon - noise * x_0}
    found = trajectory.x0_from_x * x_t + trajectory.x0_from_m * m[prediction_type]
    assert np.allclose(found, x_0, rtol=1e-10)
    assert np.allclose(signal**2 + noise**2, 1, rtol=1e-14)
    assert (trajectory.signal[-1], trajectory.noise[-1]) == (1.0, 0.0)
    assert (trajectory.input_scale == 1.0).all()
    assert trajectory.initial_scale == 1.0
    assert len(trajectory) == 4


def test_edm_networks_are_preconditioned_as_table_1_says():
    sigmas = karras_sigmas(5)
    trajectory = edm_trajectory(sigmas, sigma_data=0.7)
    sigma = sigmas
    assert trajectory.timesteps == pytest.approx(np.log(sigma) / 4)
    assert trajectory.input_scale == pytest.approx(1 / np.sqrt(sigma**2 + 0.49))
    assert trajectory.x0_from_x == pytest.approx(0.49 / (sigma**2 + 0.49))
    assert trajectory.x0_from_m == pytest.approx(sigma * 0.7 / np.sqrt(0.49 + sigma**2))
    assert (trajectory.signal == 1.0).all()
    assert trajectory.noise.tolist() == [*sigmas, 0.0]
    assert trajectory.initial_scale == sigmas[0]
    default = edm_trajectory(sigmas)
    assert default.x0_from_x == pytest.approx(0.25 / (sigma**2 + 0.25))


def test_a_hand_made_trajectory_starts_from_unit_noise_unless_told():
    made = mixture.smooth_trajectory(np.linspace(-4.0, 3.0, 5))
    assert made.initial_scale == 1.0
    assert compile_program("ddim", made).initial_scale == 1.0
    assert compile_program("ddim", replace(made, initial_scale=3.0)).initial_scale == 3.0


def test_taking_levels_repeats_them_and_ends_where_the_trajectory_ends():
    trajectory = discrete_trajectory(SCHEDULE, "epsilon", np.array([90.0, 50.0, 10.0]))
    taken = trajectory.take([0, 1, 1, 2])
    assert taken.timesteps.tolist() == [90, 50, 50, 10]
    assert taken.noise.tolist() == [*trajectory.noise[[0, 1, 1, 2]], 0.0]
    assert taken.signal.tolist() == [*trajectory.signal[[0, 1, 1, 2]], 1.0]
    assert (taken.x0_from_m == trajectory.x0_from_m[[0, 1, 1, 2]]).all()
    assert (taken.x0_from_x == trajectory.x0_from_x[[0, 1, 1, 2]]).all()


def test_refining_adds_levels_at_fractions_of_each_step_in_log_snr():
    trajectory = discrete_trajectory(SCHEDULE, "v_prediction", np.array([90.0, 50.0, 10.0]))
    fine = trajectory.refine((0.25, 0.5))
    assert len(fine) == 3 + 2 * 2
    lam = fine.log_snr
    assert np.allclose((lam[1:3] - lam[0]) / (lam[3] - lam[0]), [0.25, 0.5], atol=1e-9)
    assert fine.timesteps[[0, 3, 6]].tolist() == [90, 50, 10]
    assert (np.diff(fine.timesteps) < 0).all()
    assert (fine.x0_from_x == fine.signal[:-1]).all()
    edm = edm_trajectory(np.array([4.0, 1.0])).refine((0.5,))
    assert edm.noise == pytest.approx([4.0, 2.0, 1.0, 0.0])


def test_refining_needs_a_network_known_between_levels():
    trajectory = discrete_trajectory(SCHEDULE, "epsilon", np.array([90.0, 50.0]))
    blind = replace(trajectory, at_log_snr=None)
    with pytest.raises(ConfigurationError, match="choose a multistep sampler"):
        compile_program("dpmpp_2s", blind)
    compile_program("dpmpp_2m", blind)


@pytest.mark.parametrize(
    "timesteps",
    [[], [[3.0, 1.0]], [1.0, 3.0], [3.0, 3.0], [100.0, 1.0], [3.0, -1.0], [np.nan], [np.inf, 1.0]],
    ids=str,
)
def test_impossible_timesteps_are_refused_with_the_range(timesteps):
    with pytest.raises(ConfigurationError, match=r"strictly decreasing numbers in \[0, 99\]"):
        discrete_trajectory(SCHEDULE, "epsilon", np.array(timesteps))


def test_the_ends_of_the_range_are_timesteps():
    trajectory = discrete_trajectory(SCHEDULE, "epsilon", np.array([99.0, 0.0]))
    assert trajectory.signal[:2].tolist() == np.sqrt(SCHEDULE.alphas_cumprod[[99, 0]]).tolist()


def test_an_epsilon_network_cannot_start_without_signal():
    rescaled = make_schedule("linear", 100, rescale_zero_terminal_snr=True)
    t = np.array([99.0, 50.0])
    with pytest.raises(ConfigurationError, match="v_prediction or sample"):
        discrete_trajectory(rescaled, "epsilon", t)
    discrete_trajectory(rescaled, "epsilon", t[1:])
    for prediction_type in ("sample", "v_prediction"):
        assert discrete_trajectory(rescaled, prediction_type, t).signal[0] == 0.0


def test_there_is_nothing_between_a_level_and_one_without_signal():
    rescaled = make_schedule("linear", 100, rescale_zero_terminal_snr=True)
    with pytest.raises(ConfigurationError, match=r"98\.5.*nearest valid choices are 98 and 99"):
        discrete_trajectory(rescaled, "sample", np.array([98.5, 3.0]))
    discrete_trajectory(rescaled, "sample", np.array([99.0, 98.0, 97.5]))


@pytest.mark.parametrize(
    "sigmas", [[], [1.0, 2.0], [1.0, 1.0], [1.0, 0.0], [1.0, -1.0], [np.inf, 1.0], [[1.0]]], ids=str
)
def test_impossible_sigmas_are_refused(sigmas):
    with pytest.raises(ConfigurationError, match="positive and strictly decreasing"):
        edm_trajectory(np.array(sigmas))


@pytest.mark.parametrize("sigma_data", [0.0, -1.0, np.nan])
def test_impossible_sigma_data_is_refused(sigma_data):
    with pytest.raises(ConfigurationError, match="sigma_data must be > 0"):
        edm_trajectory(np.array([2.0, 1.0]), sigma_data)


def test_unknown_prediction_types_get_the_nearest():
    with pytest.raises(ConfigurationError, match="Did you mean 'v_prediction'"):
        discrete_trajectory(SCHEDULE, "v-prediction", np.array([5.0]))


def test_long_lists_in_messages_are_cut():
    with pytest.raises(ConfigurationError, match=r"2\.0, 3\.0, 4\.0, 5\.0, 6\.0, 7\.0\] …"):
        discrete_trajectory(SCHEDULE, "epsilon", np.arange(20.0))
