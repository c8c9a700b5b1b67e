"""Schedules are what their papers say, say so in JSON, and refuse what is none."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_runtime.errors import ConfigurationError
from ddpm_runtime.schedule import (
    SCHEDULES,
    NoiseSchedule,
    betas_from_file,
    make_schedule,
    rescaled_to_zero_terminal_snr,
)


def test_linear_betas_are_equally_spaced_between_any_ends():
    betas = make_schedule("linear", 5, beta_start=0.1, beta_end=0.5).betas
    assert betas.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5], abs=1e-15)
    default = make_schedule().betas
    assert len(default) == 1000
    assert (default[0], default[-1]) == (1e-4, 0.02)  # Ho et al. §4


def test_scaled_linear_square_roots_are_equally_spaced():
    roots = np.sqrt(make_schedule("scaled_linear", 50).betas)
    assert np.allclose(np.diff(roots), (0.012**0.5 - 0.00085**0.5) / 49, rtol=1e-10)
    assert roots[0] ** 2 == pytest.approx(0.00085)


def test_cosine_signal_is_the_squared_cosine_until_betas_are_clipped():
    """Nichol & Dhariwal eq. 17: ᾱ_t = f(t)/f(0), f(t) = cos²((t/T + s)/(1 + s)·π/2), t from 1."""
    schedule = make_schedule("cosine", 400)

    def f(t):
        return math.cos((t / 400 + 0.008) / 1.008 * math.pi / 2) ** 2

    expected = [f(t) / f(0) for t in range(1, 401)]
    assert np.allclose(schedule.alphas_cumprod[:-1], expected[:-1], rtol=1e-10)
    assert schedule.betas[-1] == 0.999
    assert make_schedule("cosine", 400, offset=0.1).betas[0] > schedule.betas[0]


def test_sigmoid_signal_is_the_falling_logistic():
    """Jabri et al. Algorithm 1, with t/T from 0 to 1."""
    schedule = make_schedule("sigmoid", 200, start=-2.0, end=3.0, tau=0.9)

    def logistic(u):
        return 1 / (1 + math.exp(-(u * 5 - 2) / 0.9))

    expected = [
        (logistic(1) - logistic(t / 200)) / (logistic(1) - logistic(0)) for t in range(1, 201)
    ]
    assert np.allclose(schedule.alphas_cumprod[:-1], expected[:-1], rtol=1e-9)
    assert schedule.betas[-1] == 0.999
    plain = make_schedule("sigmoid", 200)  # from −3 to 3, tau = 1
    u = 50 / 200
    quarter = (1 / (1 + math.exp(-3)) - 1 / (1 + math.exp(-(u * 6 - 3)))) / (
        1 / (1 + math.exp(-3)) - 1 / (1 + math.exp(3))
    )
    assert plain.alphas_cumprod[49] == pytest.approx(quarter, rel=1e-9)


def test_geometric_betas_are_a_series_that_ends_at_beta():
    betas = make_schedule("geometric", 30, beta=0.3).betas
    assert betas[-1] == pytest.approx(0.3, rel=1e-15)
    assert np.allclose(betas[1:] / betas[:-1], 1 / 0.7, rtol=1e-12)
    assert make_schedule("geometric", 10).betas[-1] == pytest.approx(0.02)
    for beta in (0.0, 1.0, -0.1):
        with pytest.raises(ConfigurationError, match=rf"^beta must lie in \(0, 1\); got {beta}"):
            make_schedule("geometric", 30, beta=beta)


def test_geometric_sigmas_are_a_series_from_min_to_max():
    schedule = make_schedule("geometric_sigmas", 20, sigma_min=0.02, sigma_max=30.0)
    sigmas = np.sqrt(1 / schedule.alphas_cumprod - 1)
    assert sigmas[0] == pytest.approx(0.02, rel=1e-9)
    assert sigmas[-1] == pytest.approx(30.0, rel=1e-9)
    assert np.allclose(sigmas[1:] / sigmas[:-1], 1500 ** (1 / 19), rtol=1e-9)
    default = make_schedule("geometric_sigmas", 20)
    assert np.sqrt(1 / default.alphas_cumprod[[0, -1]] - 1) == pytest.approx([0.01, 50.0])
    for low, high in ((0.0, 1.0), (2.0, 1.0), (1.0, 1.0)):
        with pytest.raises(ConfigurationError, match="0 < sigma_min < sigma_max"):
            make_schedule("geometric_sigmas", 20, sigma_min=low, sigma_max=high)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_signal_is_the_running_product(name):
    schedule = make_schedule(name, 60)
    product = 1.0
    for beta, found in zip(schedule.betas, schedule.alphas_cumprod, strict=True):
        product *= 1 - beta
        assert found == pytest.approx(product, rel=1e-13)
    assert schedule.num_train_timesteps == 60
    assert (schedule.betas > 0).all()
    assert (schedule.betas < 1).all()
    assert not schedule.betas.flags.writeable
    assert not schedule.alphas_cumprod.flags.writeable


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("rescaled", [False, True])
def test_a_schedule_is_made_again_from_its_json(name, rescaled):
    made = make_schedule(name, 40, rescale_zero_terminal_snr=rescaled)
    again = make_schedule(**json.loads(json.dumps(made.spec)))
    assert (again.betas == made.betas).all()
    assert again.spec == made.spec
    assert ("rescale_zero_terminal_snr" in made.spec) == rescaled


def test_custom_betas_are_made_again_from_their_json():
    made = make_schedule("custom", 3, betas=np.array([0.1, 0.25, 1 / 3]))
    assert (make_schedule(**json.loads(json.dumps(made.spec))).betas == made.betas).all()
    for betas in ([0.1, 0.2], [0.1] * 4, []):
        with pytest.raises(ConfigurationError, match="one per timestep"):
            make_schedule("custom", 3, betas=betas)
    with pytest.raises(ConfigurationError, match=r"\['beta_end'\]"):
        make_schedule("custom", 1, betas=[0.1], beta_end=0.2)


@pytest.mark.parametrize("name", ["linear", "cosine", "scaled_linear"])
def test_zero_terminal_snr_keeps_the_first_level_and_loses_the_last(name):
    """Lin et al. Algorithm 1: √ᾱ is moved and stretched, nothing else."""
    plain = make_schedule(name)
    rescaled = make_schedule(name, rescale_zero_terminal_snr=True)
    before, after = np.sqrt(plain.alphas_cumprod), np.sqrt(rescaled.alphas_cumprod)
    assert after[-1] == 0.0
    assert rescaled.betas[-1] == 1.0
    assert after[0] == pytest.approx(before[0], rel=1e-12)
    stretch = (after[:-1] - after[0]) - (before[:-1] - before[0]) * before[0] / (
        before[0] - before[-1]
    )
    assert np.abs(stretch).max() < 1e-9
    with pytest.raises(ConfigurationError, match="num_train_timesteps ≥ 2; got 1"):
        make_schedule("linear", 1, rescale_zero_terminal_snr=True)
    with pytest.raises(ConfigurationError, match="≥ 2"):
        rescaled_to_zero_terminal_snr(np.array([0.5]))
    assert len(rescaled_to_zero_terminal_snr(np.array([0.9, 0.5]))) == 2


# --- between timesteps ----------------------------------------------------------------------------


def test_log_sigma_is_linear_between_timesteps_and_exact_on_them():
    schedule = make_schedule("linear", 100)
    sigma = np.sqrt(1 / schedule.alphas_cumprod - 1)
    assert np.allclose(schedule.log_sigmas, np.log(sigma), rtol=1e-12, atol=1e-12)
    whole = np.array([99.0, 50.0, 1.0, 0.0])
    assert (schedule.alphas_cumprod_at(whole) == schedule.alphas_cumprod[[99, 50, 1, 0]]).all()
    between = schedule.alphas_cumprod_at(np.array([50.25]))[0]
    assert np.sqrt(1 / between - 1) == pytest.approx(sigma[50] ** 0.75 * sigma[51] ** 0.25)


@given(st.floats(0, 98.999))
def test_timesteps_are_found_again_from_their_noise(t):
    schedule = make_schedule("linear", 100)
    a = schedule.alphas_cumprod_at(np.array([t]))
    found = schedule.timesteps_at(0.5 * np.log(1 / a - 1))[0]
    assert found == pytest.approx(t, abs=1e-8)
    if abs(t - round(t)) < 1e-10:
        assert found == round(t)


def test_noise_beyond_the_schedule_is_moved_to_its_end():
    schedule = make_schedule("linear", 100)
    assert schedule.timesteps_at(np.array([-99.0, 99.0])).tolist() == [0.0, 99.0]
    rescaled = make_schedule("linear", 100, rescale_zero_terminal_snr=True)
    assert rescaled.log_sigmas[-1] == np.inf
    assert rescaled.timesteps_at(np.array([99.0])).tolist() == [98.0]


def test_a_whole_timestep_is_not_lost_to_rounding():
    schedule = make_schedule("linear", 100)
    nearly = schedule.log_sigmas[40] + 1e-13
    assert schedule.timesteps_at(np.array([nearly]))[0] == 40.0
    clearly = schedule.log_sigmas[40] + 1e-6
    assert schedule.timesteps_at(np.array([clearly]))[0] > 40.0


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("betas", "named"),
    [
        ([0.1, 0.0, 0.2], r"in \(0, 1\); betas\[1\] is 0\.0\..*nearest valid choice is 1e-08"),
        ([0.1, 1.0, 0.2], r"in \(0, 1\); betas\[1\] is 1\.0\..*nearest valid choice is 0\.999"),
        ([0.1, 0.2, 1.5], r"in \(0, 1\); betas\[2\] is 1\.5\..*nearest valid choice is 0\.999"),
        ([-0.1], r"in \(0, 1\); betas\[0\] is -0\.1\..*nearest valid choice is 1e-08"),
        ([0.1, math.nan], r"betas\[1\] is nan"),
        ([], "vector"),
        ([[0.1]], "vector"),
        ([1e-20, 0.1], "too small"),
    ],
)
def test_betas_outside_the_open_interval_are_refused_by_index(betas, named):
    with pytest.raises(ConfigurationError, match=named):
        NoiseSchedule(np.array(betas))


def test_the_nearest_betas_named_in_a_refusal_are_accepted():
    assert (np.diff(NoiseSchedule(np.array([1e-8, 0.5, 0.999])).alphas_cumprod) < 0).all()


def test_only_the_last_beta_may_be_one():
    assert NoiseSchedule(np.array([0.1, 1.0])).alphas_cumprod[-1] == 0.0


def test_unknown_names_and_options_get_the_nearest():
    with pytest.raises(ConfigurationError, match="Did you mean 'linear'"):
        make_schedule("liner")
    with pytest.raises(ConfigurationError, match="Did you mean 'beta_end'"):
        make_schedule("linear", beta_ends=0.1)
    with pytest.raises(
        ConfigurationError, match=r"unknown option.*'T'; possible: beta_end, beta_start"
    ):
        make_schedule("linear", 10, T=5)
    with pytest.raises(ConfigurationError, match="≥ 1; got 0"):
        make_schedule("linear", 0)
    with pytest.raises(ConfigurationError, match="too small"):
        make_schedule("geometric", 5000)


# --- betas from a file ----------------------------------------------------------------------------


def test_betas_are_read_from_json_and_npy(tmp_path: Path):
    betas = [0.1, 0.2, 1 / 3]
    np.save(tmp_path / "a.npy", np.array(betas))
    (tmp_path / "b.json").write_text(json.dumps(betas))
    (tmp_path / "c.json").write_text(json.dumps({"betas": betas}))
    for name in ("a.npy", "b.json", "c.json"):
        found = betas_from_file(tmp_path / name)
        assert found.dtype == np.float64
        assert found.tolist() == betas
        assert make_schedule("custom", 3, betas=found).num_train_timesteps == 3


def test_a_file_of_betas_that_are_none_is_refused_by_index(tmp_path: Path):
    (tmp_path / "betas.json").write_text("[0.1, 1.2, 0.3]")
    betas = betas_from_file(tmp_path / "betas.json")
    with pytest.raises(ConfigurationError, match=r"betas\[1\] is 1\.2\..*nearest valid choice"):
        make_schedule("custom", len(betas), betas=betas)
    with pytest.raises(ConfigurationError, match="got 3 betas for num_train_timesteps=4"):
        make_schedule("custom", 4, betas=betas)


class _Canary:
    def __reduce__(self):
        return (open, ("canary", "w"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("missing.json", None),
        ("missing.npy", None),
        ("text.json", b"not json"),
        ("binary.json", b"\xff\xfe\x00"),
        ("words.json", b'["a", "b"]'),
        ("booleans.json", b"[true]"),
        ("nested.json", b"[[0.1]]"),
        ("object.json", b'{"alphas": [0.1]}'),
        ("ragged.json", b"[0.1, [0.2]]"),
        ("deep.json", b"[" * 100_000),
        ("number.json", b"0.1"),
        ("cut.npy", b"\x93NUMPY\x01"),
    ],
)
def test_files_that_hold_no_betas_are_refused_by_name(tmp_path: Path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=rf"{name}.*numpy\.save\(path, betas\)"):
        betas_from_file(tmp_path / name)


def test_a_pickle_in_a_file_of_betas_is_never_run(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("evil.npy", np.array([_Canary()], dtype=object), allow_pickle=True)
    with pytest.raises(ConfigurationError, match=r"evil\.npy"):
        betas_from_file("evil.npy")
    assert not Path("canary").exists()


def test_other_suffixes_and_huge_files_are_refused(tmp_path: Path):
    with pytest.raises(ConfigurationError, match=r"\.json or \.npy"):
        betas_from_file(tmp_path / "betas.pt")
    huge = tmp_path / "huge.npy"
    with huge.open("wb") as file:
        file.truncate((1 << 24) + 1)
    with pytest.raises(ConfigurationError, match="larger than"):
        betas_from_file(huge)
