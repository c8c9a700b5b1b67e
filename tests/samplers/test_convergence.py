"""Reliability R5: solvers converge to the exact probability flow at the order they claim.

The network is the exact denoiser of a three-component mixture; the exact flow is DOP853 at 1e-13.
Steps are equal in log-SNR over [−4, 3] (σ from 55 to 0.05), the first at nearly pure noise, where
starting steps of low order cost next to nothing. Order is the slope of log(error) over 200 … 800
steps.
"""

from __future__ import annotations

import numpy as np
import pytest

from ddpm_runtime.samplers import SAMPLERS, build_program, compile_program
from ddpm_runtime.schedule import make_schedule
from helpers import float64_lanes, mixture

START, END = -4.0, 3.0
X = np.linspace(-2.5, 2.5, 41)
STEPS = (200, 400, 800)


@pytest.fixture(scope="module")
def exact():
    return mixture.exact_flow(X, START, END)


def errors(exact, sampler, options, levels=lambda n: np.linspace(START, END, n + 1)):
    out = []
    for steps in STEPS:
        trajectory = mixture.smooth_trajectory(levels(steps))
        program = compile_program(sampler, trajectory, clip=np.inf, **options)
        x = float64_lanes.run(program, mixture.network, X, np.zeros((len(program), 1)))[-1]
        out.append(np.abs(x - exact).max())
    return np.array(out)


def order(found):
    return -np.polyfit(np.log(STEPS), np.log(found), 1)[0]


@pytest.fixture
def measured(exact, figures):
    """The order of a sampler, noted down."""

    def order_of(sampler, options):
        found = order(errors(exact, sampler, options))
        name = "-".join([sampler, *(f"{k}={v}" for k, v in options.items())])
        figures.each("order of convergence", name, f"{found:.2f}")
        return found

    return order_of


@pytest.mark.parametrize(
    ("sampler", "options"),
    [("ddim", {}), ("euler", {}), ("ipndm", {"order": 1})],
    ids=str,
)
def test_first_order(measured, sampler, options):
    assert measured(sampler, options) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("heun", {}),
        ("dpmpp_2m", {}),
        ("dpmpp_2m", {"solver_type": "heun"}),
        ("dpmpp_2s", {}),
        ("dpmpp_2s", {"solver_type": "heun"}),
        ("dpm_solver_2s", {}),
        ("dpm_solver_2s", {"solver_type": "heun"}),
        ("dpmpp_3m", {"published": True}),
        ("unipc", {"order": 1}),
        # Adams–Bashforth for equal σ, on steps that are not: second order whatever the name says
        ("ipndm", {"order": 2}),
        ("ipndm", {"order": 3}),
        ("ipndm", {"order": 4}),
        ("plms", {}),
    ],
    ids=str,
)
def test_second_order(measured, sampler, options):
    assert measured(sampler, options) == pytest.approx(2.0, abs=0.2)


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("dpmpp_3m", {}),
        ("dpmpp_3s", {}),
        ("dpmpp_3s", {"solver_type": "heun"}),
        ("dpm_solver_3s", {}),
        ("dpm_solver_3s", {"solver_type": "heun"}),
        # the corrector is one order above the predictor
        ("unipc", {"order": 2}),
        ("unipc", {"order": 2, "solver_type": "bh1"}),
        ("unipc", {"order": 3}),
        ("unipc", {"order": 3, "solver_type": "bh1"}),
    ],
    ids=str,
)
def test_third_order_and_above(measured, sampler, options):
    assert measured(sampler, options) >= (3.6 if options.get("order") == 3 else 2.6)


def test_adams_bashforth_has_its_own_order_on_equal_steps_of_sigma():
    """Over σ from 1.2 to 0.4, equal steps; the start of order 1 costs one step of order 2."""
    start, end = -np.log(1.2), -np.log(0.4)
    exact = mixture.exact_flow(X, start, end)

    def equal_sigma(n):
        return -np.log(np.linspace(np.exp(-start), np.exp(-end), n + 1))

    assert order(errors(exact, "ipndm", {"order": 2}, equal_sigma)) == pytest.approx(2, abs=0.2)
    warm = {p: errors(exact, "ipndm", {"order": p}, equal_sigma)[-1] for p in (1, 2, 3)}
    assert warm[3] < warm[2] < warm[1] / 50


@pytest.mark.parametrize(
    "sampler", sorted(name for name, s in SAMPLERS.items() if not s.stochastic)
)
def test_the_order_in_the_list_is_the_order_measured(exact, sampler):
    assert round(order(errors(exact, sampler, {}))) == SAMPLERS[sampler].order


def test_the_stochastic_solver_converges_in_law(figures):
    """SDE-2M on N(0, 0.3²): its mean and variance, propagated exactly, approach the data's.

    The chain is linear and Gaussian, so the covariance of the registers is enough; no sampling.
    """
    deviation = 0.3

    def variance_error(steps):
        trajectory = mixture.smooth_trajectory(np.linspace(START, END, steps + 1))
        program = compile_program("dpmpp_2m_sde", trajectory, clip=np.inf)
        covariance = np.zeros((2, 2))
        a, s = program.signal, program.noise
        covariance[0, 0] = a[0] ** 2 * deviation**2 + s[0] ** 2  # started right
        for row in range(steps):
            gain = a[row] * deviation**2 / (a[row] ** 2 * deviation**2 + s[row] ** 2)
            W = program.weights[row]
            linear = W[:, :2].copy()
            linear[:, 0] += gain * (W[:, 2] + W[:, 3])  # m is x_0 for a sample network
            covariance = linear @ covariance @ linear.T + np.outer(W[:, 4], W[:, 4])
        return abs(covariance[0, 0] - (a[-1] ** 2 * deviation**2 + s[-1] ** 2))

    found = np.array([variance_error(n) for n in STEPS])
    figures.each("order of convergence", "dpmpp_2m_sde (in law)", f"{order(found):.2f}")
    assert order(found) == pytest.approx(2.0, abs=0.2)


@pytest.mark.parametrize(
    "sampler",
    sorted(n for n, s in SAMPLERS.items() if s.recommended_spacing != "leading" and n != "heun"),
)
def test_the_recommended_spacing_beats_leading_at_twenty_evaluations(sampler):
    """Error of the whole chain on the linear schedule, against the exact flow to t = 0.

    Heun's is chosen by quality on the shipped network; here its ten steps are equally bad on both.
    """
    if SAMPLERS[sampler].stochastic:
        pytest.skip("no flow to compare a stochastic sampler with")
    schedule = make_schedule()
    x = np.random.default_rng(0).normal(size=500)
    last = np.sqrt(schedule.alphas_cumprod[0]), np.sqrt(1 - schedule.alphas_cumprod[0])
    flowed = mixture.exact_flow(x, -schedule.log_sigmas[-1], -schedule.log_sigmas[0])
    exact = mixture.denoiser(flowed, *last)

    def error(spacing):
        program = build_program(
            sampler,
            schedule=schedule,
            prediction_type="sample",
            num_inference_steps=20 // SAMPLERS[sampler].evaluations_per_step,
            spacing=spacing,
            clip=np.inf,
        )
        found = float64_lanes.run(
            program,
            lambda x, t, row: mixture.denoiser(x, program.signal[row], program.noise[row]),
            x,
            np.zeros((len(program), 1)),
        )[-1]
        return np.sqrt(np.mean((found - exact) ** 2))

    assert error(SAMPLERS[sampler].recommended_spacing) < 0.7 * error("leading")
