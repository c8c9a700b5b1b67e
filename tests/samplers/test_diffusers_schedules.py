"""Reliability R6: schedules, spacings and zero terminal SNR are diffusers', in float64.

Which levels are visited, before any sampler: the trajectories are in ``test_diffusers_parity``.
"""

from __future__ import annotations

import numpy as np
import pytest

from ddpm_runtime.samplers import compile_program
from ddpm_runtime.schedule import make_schedule, timestep_spacing
from ddpm_runtime.trajectory import discrete_trajectory
from helpers import float64_lanes

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from helpers.diffusers_oracle import (
    EXACT,
    SCHEDULES,
    answer,
    drive,
    make,
    precision,
)

# diffusers calls np.array on tensors, which NumPy 2 deprecates for torch's __array__
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("rescaled", [False, True])
def test_schedules_are_diffusers(name, rescaled):
    theirs, ours = SCHEDULES[name]
    with precision("DDIMScheduler", EXACT):
        scheduler = make("DDIMScheduler", rescale_betas_zero_snr=rescaled, **theirs)
    schedule = make_schedule(**ours, rescale_zero_terminal_snr=rescaled)
    assert np.abs(schedule.betas - scheduler.betas.numpy()).max() <= 1e-14
    assert np.abs(schedule.alphas_cumprod - scheduler.alphas_cumprod.numpy()).max() <= 1e-14
    assert (schedule.alphas_cumprod[-1] == 0.0) == rescaled


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_spacings_are_diffusers_for_every_number_of_steps(spacing):
    scheduler = make("DDIMScheduler", timestep_spacing=spacing)
    for steps in range(1, 1001):
        if spacing == "linspace" and steps == 1:
            continue  # theirs starts at t = 0, where there is nothing to denoise; ours at T − 1
        scheduler.set_timesteps(steps)
        theirs = scheduler.timesteps.numpy()[:steps]  # np.arange may overshoot to t = −1 there
        assert (timestep_spacing(spacing, 1000, steps) == theirs).all(), steps


@pytest.mark.parametrize(
    ("name", "flag"), [("karras", "use_karras_sigmas"), ("log_snr", "use_lu_lambdas")]
)
@pytest.mark.parametrize("schedule_name", ["linear", "scaled_linear", "cosine"])
def test_sigma_spacings_are_diffusers(name, flag, schedule_name):
    """The same noise levels; diffusers rounds what it tells the network on some schedules."""
    theirs, ours = SCHEDULES[schedule_name]
    schedule = make_schedule(**ours)
    with precision("DPMSolverMultistepScheduler", EXACT):
        scheduler = make("DPMSolverMultistepScheduler", **{flag: True}, **theirs)
        scheduler.set_timesteps(12)
    trajectory = discrete_trajectory(
        schedule, "epsilon", timestep_spacing(name, 1000, 12, schedule)
    )
    sigma = trajectory.noise[:-1] / trajectory.signal[:-1]
    assert np.allclose(sigma, scheduler.sigmas.numpy()[:-1], rtol=1e-9)
    # cast to int64 there, rounded before or not
    assert np.abs(trajectory.timesteps - scheduler.timesteps.numpy()).max() < 1


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_zero_terminal_snr_follows_diffusers(sampler, prediction_type):
    name = {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler"}[sampler]
    rng = np.random.default_rng(5)
    x_T, draws = rng.normal(size=64), rng.normal(size=(10, 64))
    schedule = make_schedule(rescale_zero_terminal_snr=True)
    t = timestep_spacing("trailing", 1000, 10)
    program = compile_program(
        sampler, discrete_trajectory(schedule, prediction_type, t), clip=np.inf
    )

    def network(x, timestep, row):
        signal, noise = program.signal[row], program.noise[row]
        return answer(prediction_type, x, signal, noise)

    with precision(name, EXACT) as module:
        scheduler = make(
            name,
            prediction_type=prediction_type,
            timestep_spacing="trailing",
            beta_start=1e-4,
            beta_end=0.02,
            clip_sample=False,
            rescale_betas_zero_snr=True,
        )
        scheduler.set_timesteps(10)
        levels = list(zip(program.signal, program.noise, strict=True))
        theirs = drive(
            scheduler,
            module,
            lambda x, signal, noise, i: answer(prediction_type, x, signal, noise),
            x_T,
            draws,
            EXACT,
            levels=levels,
        )
    ours = float64_lanes.run(program, network, x_T, draws)
    # DDPM there adds noise of deviation 1e-10 after the last step (see the differences)
    assert np.abs(ours - theirs).max() <= 1e-9


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_nearly_zero_terminal_snr_follows_diffusers(name):
    """Solvers in λ need some signal there, and diffusers puts ᾱ_T = 2⁻²⁴; so does this trajectory.

    (No custom betas could: 2⁻²⁴ is more signal than the timestep before has.)
    """
    sampler = {"D": "dpmpp_2m", "U": "unipc"}[name[0]]
    schedule = make_schedule(rescale_zero_terminal_snr=True)
    signal, noise = 2.0**-12, np.sqrt(1 - 2.0**-24)
    rng = np.random.default_rng(6)
    x_T, draws = rng.normal(size=64), rng.normal(size=(10, 64))
    with precision(name, EXACT) as module:
        scheduler = make(
            name,
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            beta_start=1e-4,
            beta_end=0.02,
            rescale_betas_zero_snr=True,
        )
        scheduler.set_timesteps(10)
        theirs = drive(
            scheduler,
            module,
            lambda x, signal, noise, i: answer("v_prediction", x, signal, noise),
            x_T,
            draws,
            EXACT,
        )
    t = timestep_spacing("trailing", 1000, 10)
    trajectory = discrete_trajectory(schedule, "v_prediction", t)
    trajectory.signal[0], trajectory.noise[0] = signal, noise
    trajectory.x0_from_x[0], trajectory.x0_from_m[0] = signal, -noise
    program = compile_program(sampler, trajectory, clip=np.inf)
    ours = float64_lanes.run(
        program,
        lambda x, t, row: answer("v_prediction", x, program.signal[row], program.noise[row]),
        x_T,
        draws,
    )
    assert np.abs(ours - theirs).max() <= 1e-9
