"""Reliability R6: our programs follow diffusers' schedulers, step for step.

As shipped their tables are float32, and whole trajectories agree to 5e-5. With the same code run
in float64 (see ``helpers.diffusers_oracle``) they agree to 1e-9. The network is the exact denoiser
of a Gaussian mixture, told the noise level, so that neither side's rounding of timesteps matters.

Where diffusers does something else, a test below shows what, and the test's docstring says why.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ddpm_runtime.samplers import compile_program
from ddpm_runtime.schedule import karras_sigmas, make_schedule, timestep_spacing
from ddpm_runtime.trajectory import Evaluations, discrete_trajectory, edm_trajectory
from helpers import float64_lanes
from helpers.mixture import denoiser

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from helpers.diffusers_oracle import (  # noqa: E402
    EXACT,
    SHIPPED,
    Case,
    answer,
    both,
    drive,
    make,
    precision,
)

# diffusers calls np.array on tensors, which NumPy 2 deprecates for torch's __array__
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

BAR = {SHIPPED: 5e-5, EXACT: 1e-9}


@pytest.fixture
def follows(figures, here):
    """That two trajectories agree within the bar, noted down; x of large levels relative to it."""

    def check(ours, theirs, dtype, bar=None, level=1.0):
        bar = bar or BAR[dtype]
        gap = np.abs((ours - theirs) / level).max()
        how = "as shipped (float32 tables)" if dtype == SHIPPED else "in float64"
        if bar == BAR[dtype]:
            figures.worst(f"difference from diffusers {how}", gap, bar, here)
        assert gap <= bar

    return check


def ddim(eta, **more):
    return Case("DDIMScheduler", "ddim", options={"eta": eta}, step_options={"eta": eta}, **more)


_MULTI = "DPMSolverMultistepScheduler"
CASES = [
    *(
        Case(
            "DDPMScheduler", "ddpm", {"clip_sample": clip < 9, "variance_type": kind},
            {"variance": kind}, clip=clip,
            # on other spacings diffusers adds noise after the last step; shown below
            spacings=("leading", "linspace"),
        )
        for kind in ("fixed_small", "fixed_large")
        for clip in (np.inf, 1.0)
    ),
    *(
        ddim(eta, config={"clip_sample": False}, spacings=("leading", "trailing"))
        for eta in (0.0, 0.5, 1.0)
    ),
    Case(
        "DDIMScheduler", "ddim", {"clip_sample": True}, {"eta": 0.5},
        {"eta": 0.5, "use_clipped_model_output": True}, clip=1.0, spacings=("leading", "trailing"),
    ),
    Case("EulerDiscreteScheduler", "euler", types=("epsilon", "v_prediction"), scaled=True),
    Case(
        "EulerAncestralDiscreteScheduler", "euler_ancestral",
        types=("epsilon", "v_prediction"), scaled=True,
    ),
    Case("HeunDiscreteScheduler", "heun", scaled=True),
    Case("HeunDiscreteScheduler", "heun", {"clip_sample": True}, clip=1.0, scaled=True),
    Case(_MULTI, "dpmpp_2m"),
    Case(_MULTI, "dpmpp_2m", {"solver_type": "heun"}, {"solver_type": "heun"}),
    Case(_MULTI, "dpmpp_2m", steps=20),
    Case(_MULTI, "dpmpp_3m", {"solver_order": 3}, {"published": True}),
    Case(_MULTI, "dpmpp_3m", {"solver_order": 3}, {"published": True}, steps=20),
    Case(_MULTI, "dpmpp_2m_sde", {"algorithm_type": "sde-dpmsolver++"}),
    Case(
        _MULTI, "dpmpp_2m_sde", {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
        {"solver_type": "heun"},
    ),
    *(
        Case(
            "UniPCMultistepScheduler", "unipc", {"solver_order": order, "solver_type": kind},
            {"order": order, "solver_type": kind},
        )
        for order in (1, 2, 3)
        for kind in ("bh1", "bh2")
    ),
    Case(
        "PNDMScheduler", "plms", {"skip_prk_steps": True, "set_alpha_to_one": True},
        # v_prediction and linspace differ; shown below
        types=("epsilon",), spacings=("leading", "trailing"),
    ),
]  # fmt: skip


def _parameters():
    for case in CASES:
        for prediction_type in case.types:
            for spacing in case.spacings:
                yield pytest.param(
                    case, prediction_type, spacing, id=f"{case.name}-{prediction_type}-{spacing}"
                )


@pytest.mark.parametrize("dtype", [SHIPPED, EXACT], ids=["as-shipped", "float64"])
@pytest.mark.parametrize(("case", "prediction_type", "spacing"), list(_parameters()))
def test_trajectories_follow_diffusers(case, prediction_type, spacing, dtype, follows):
    ours, theirs = both(case, prediction_type, spacing, dtype)
    if case.config.get("solver_type") == "bh1":  # theirs ends in NaN; see the differences
        ours, theirs = ours[:-1], theirs[:-1]
    follows(ours, theirs, dtype)


@pytest.mark.parametrize("schedule", ["scaled_linear", "cosine"])
@pytest.mark.parametrize(
    "case", [c for c in CASES if not c.config or "solver_order" in c.config], ids=lambda c: c.name
)
def test_trajectories_follow_diffusers_on_other_schedules(case, schedule, follows):
    ours, theirs = both(
        case, "v_prediction" if len(case.types) > 1 else "epsilon", "trailing", EXACT, schedule
    )
    if case.config.get("solver_type") == "bh1":
        ours, theirs = ours[:-1], theirs[:-1]
    # the cosine schedule starts at σ = 2·10⁴, and codes over x / signal lose those digits
    follows(ours, theirs, EXACT, 1e-8 if schedule == "cosine" and case.scaled else None)


@pytest.mark.parametrize("clip", [False, True])
def test_learned_range_variance_follows_diffusers(clip, follows):
    rng = np.random.default_rng(7)
    x_T, draws = rng.normal(size=64), rng.normal(size=(20, 64))
    v = rng.uniform(-1, 1, size=(20, 64))
    schedule = make_schedule()
    t = timestep_spacing("leading", 1000, 20)
    program = compile_program(
        "ddpm",
        discrete_trajectory(schedule, "epsilon", t),
        clip=1.0 if clip else np.inf,
        variance="learned_range",
    )
    registers, ours = x_T[None], []
    for row in range(20):
        m = answer("epsilon", registers[0], program.signal[row], program.noise[row])
        registers = float64_lanes.advance(program, row, registers, m, draws[row], v[row])
        ours.append(registers[0])
    with precision("DDPMScheduler", EXACT) as module:
        scheduler = make(
            "DDPMScheduler",
            variance_type="learned_range",
            clip_sample=clip,
            beta_start=1e-4,
            beta_end=0.02,
        )
        scheduler.set_timesteps(20)
        theirs = drive(
            scheduler,
            module,
            lambda x, signal, noise, i: np.concatenate([answer("epsilon", x, signal, noise), v[i]]),
            x_T,
            draws,
            EXACT,
        )
    follows(np.stack(ours), theirs, EXACT)


@pytest.mark.parametrize("dtype", [SHIPPED, EXACT], ids=["as-shipped", "float64"])
def test_ipndm_follows_diffusers_on_its_own_schedule(dtype, follows):
    """IPNDMScheduler ignores DDPM schedules: signal = √(1 − sin⁴), noise = sin², v-prediction."""
    rng = np.random.default_rng(8)
    x_T = rng.normal(size=64)
    with precision("IPNDMScheduler", dtype) as module:
        scheduler = make("IPNDMScheduler")
        scheduler.set_timesteps(12)
        noise = scheduler.betas.to(torch.float64).numpy()
        noise[0] = min(noise[0], 1 - 1e-12)  # no signal there at all; theirs divides by 1e-8
        signal = np.sqrt(1 - noise**2)
        scheduler.betas = torch.tensor(noise, dtype=dtype)
        scheduler.alphas = torch.tensor(signal, dtype=dtype)
        levels = list(zip(signal, noise, strict=True))
        theirs = drive(
            scheduler,
            module,
            lambda x, signal, noise, i: answer("v_prediction", x, signal, noise),
            x_T,
            np.zeros((12, 64)),
            dtype,
            levels=levels,
        )
    trajectory = replace(
        discrete_trajectory(make_schedule(), "v_prediction", np.arange(12.0)[::-1]),
        signal=signal,
        noise=noise,
        x0_from_x=signal[:-1],
        x0_from_m=-noise[:-1],
    )
    program = compile_program("ipndm", trajectory, clip=np.inf)
    ours = float64_lanes.run(
        program, lambda x, t, row: answer("v_prediction", x, *levels[row]), x_T, np.zeros((12, 1))
    )
    follows(ours, theirs, dtype)


@pytest.mark.parametrize("dtype", [SHIPPED, EXACT], ids=["as-shipped", "float64"])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver"])
@pytest.mark.parametrize(("order", "solver_type"), [(2, "midpoint"), (2, "heun"), (3, "heun")])
def test_singlestep_solvers_follow_diffusers(order, solver_type, algorithm, dtype, follows):
    """Its singlestep scheduler takes intermediate levels from the grid, so ours is given the same.

    Its DPM-Solver (ε) cannot step to noise 0; the last step is left out there.
    """
    name = "DPMSolverSinglestepScheduler"
    data = algorithm == "dpmsolver++"
    sampler = f"{'dpmpp' if data else 'dpm_solver'}_{order}s"
    grid = np.round(np.linspace(990, 40, 4 * order + 1))
    schedule = make_schedule()
    rng = np.random.default_rng(9)
    x_T = rng.normal(size=64)
    with precision(name, dtype) as module:
        scheduler = make(
            name,
            solver_order=order,
            algorithm_type=algorithm,
            solver_type=solver_type,
            final_sigmas_type="zero" if data else "sigma_min",
            beta_start=1e-4,
            beta_end=0.02,
        )
        scheduler.set_timesteps(timesteps=grid.astype(int).tolist())
        theirs = drive(
            scheduler,
            module,
            lambda x, signal, noise, i: answer("epsilon", x, signal, noise),
            x_T,
            np.zeros((len(grid), 64)),
            dtype,
        )
    everywhere = discrete_trajectory(schedule, "epsilon", grid)
    inside = np.array([i for i in range(len(grid)) if i % order])
    outer = replace(
        everywhere.take(range(0, len(grid), order)),
        at_log_snr=lambda _: _evaluations(everywhere, inside),
    )
    program = compile_program(sampler, outer, clip=np.inf, solver_type=solver_type)
    assert (program.timesteps == grid).all()
    ours = float64_lanes.run(
        program,
        lambda x, t, row: answer("epsilon", x, program.signal[row], program.noise[row]),
        x_T,
        np.zeros((len(grid), 1)),
    )
    rows = len(grid) if data else len(grid) - 1
    follows(ours[:rows], theirs[:rows], dtype)


def _evaluations(trajectory, at):
    return Evaluations(
        timesteps=trajectory.timesteps[at],
        signal=trajectory.signal[at],
        noise=trajectory.noise[at],
        input_scale=trajectory.input_scale[at],
        x0_from_x=trajectory.x0_from_x[at],
        x0_from_m=trajectory.x0_from_m[at],
    )


@pytest.mark.parametrize("dtype", [SHIPPED, EXACT], ids=["as-shipped", "float64"])
@pytest.mark.parametrize(
    ("name", "sampler", "config", "options"),
    [
        ("EDMEulerScheduler", "euler", {}, {}),
        ("EDMDPMSolverMultistepScheduler", "dpmpp_2m", {}, {}),
        (
            "EDMDPMSolverMultistepScheduler", "dpmpp_2m",
            {"solver_type": "heun"}, {"solver_type": "heun"},
        ),
        (
            "EDMDPMSolverMultistepScheduler", "dpmpp_3m",
            {"solver_order": 3}, {"published": True},
        ),
        (
            "EDMDPMSolverMultistepScheduler", "dpmpp_2m_sde",
            {"algorithm_type": "sde-dpmsolver++"}, {},
        ),
    ],
)  # fmt: skip
def test_edm_networks_follow_diffusers(name, sampler, config, options, dtype, follows):
    sigma_data = 0.5
    trajectory = edm_trajectory(karras_sigmas(16), sigma_data)
    program = compile_program(sampler, trajectory, clip=np.inf, **options)

    def network(scaled, sigma):
        """F of Karras et al. eq. 7, for the exact denoiser."""
        x = scaled * np.sqrt(sigma**2 + sigma_data**2)
        c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
        c_out = sigma * sigma_data / np.sqrt(sigma**2 + sigma_data**2)
        return (denoiser(x, 1.0, sigma) - c_skip * x) / c_out

    rng = np.random.default_rng(10)
    x_T, draws = 80 * rng.normal(size=64), rng.normal(size=(16, 64))
    with precision(name, dtype) as module:
        scheduler = make(name, **config)
        scheduler.set_timesteps(16)
        sigmas = scheduler.sigmas.to(torch.float64).numpy()
        told = scheduler.timesteps.to(torch.float64).numpy()
        theirs = drive(
            scheduler,
            module,
            lambda x, signal, noise, i: network(x, sigmas[i]),
            x_T,
            draws,
            dtype,
            levels=[(1.0, s) for s in sigmas],
        )
    assert np.allclose(program.timesteps, told, rtol=1e-5)
    ours = float64_lanes.run(
        program, lambda x, c_noise, row: network(x, np.exp(4 * c_noise)), x_T, draws
    )
    # x starts at 80: the bar is relative to the level
    follows(ours, theirs, dtype, level=np.maximum(program.noise[:-1], 1.0)[:, None])
