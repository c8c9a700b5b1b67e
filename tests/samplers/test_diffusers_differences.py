"""Where diffusers 0.42 and we part, shown by running both, with the reason.

Each test would fail if the difference went away, so the table of differences cannot go stale
unnoticed; another version of diffusers may differ otherwise, and is not judged.
"""

from __future__ import annotations

import inspect

import numpy as np
import pytest

from ddpm_runtime.samplers import compile_program
from ddpm_runtime.schedule import make_schedule, timestep_spacing
from ddpm_runtime.trajectory import discrete_trajectory
from helpers import float64_lanes, mixture

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")

from helpers.diffusers_oracle import EXACT, Case, answer, both, drive, make, precision  # noqa: E402

pytestmark = [
    # diffusers calls np.array on tensors, which NumPy 2 deprecates for torch's __array__
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.skipif(
        not diffusers.__version__.startswith("0.42."), reason="describes diffusers 0.42"
    ),
]

LINEAR = {"beta_start": 1e-4, "beta_end": 0.02}


def gap(case, prediction_type, spacing):
    ours, theirs = both(case, prediction_type, spacing, EXACT)
    return np.abs(ours - theirs).max(axis=1)


@pytest.mark.parametrize(("variance", "last"), [("fixed_small", 1e-10), ("fixed_large", 0.32)])
def test_ddpm_adds_noise_after_the_last_step_of_a_trailing_spacing(variance, last):
    """Theirs adds noise while t > 0, and a trailing spacing ends at t > 0.

    fixed_small adds its floor, deviation 1e-10; fixed_large adds all of √(1 − ᾱ_t): a noisy image.
    Ho et al. Algorithm 2 line 3: z = 0 in the last step.
    """
    case = Case(
        "DDPMScheduler", "ddpm", {"clip_sample": False, "variance_type": variance},
        {"variance": variance},
    )  # fmt: skip
    gaps = gap(case, "epsilon", "trailing")
    assert gaps[:-1].max() <= 1e-9
    # the last draw there, times its deviation
    z = np.random.default_rng(3)
    z.normal(size=64)
    z = z.normal(size=(10, 64))[-1]
    assert gaps[-1] == pytest.approx(np.abs(z).max() * last, rel=0.05)


def test_ddim_on_linspace_steps_to_a_level_that_is_not_its_next_timestep():
    """Theirs steps to t − T//S, which is not the next entry of its own timesteps.

    Open issues #12633 and #11347. Ours steps between consecutive timesteps.
    """
    case = Case("DDIMScheduler", "ddim", {"clip_sample": False})
    gaps = gap(case, "epsilon", "linspace")
    assert gaps.max() > 1e-2
    scheduler = make("DDIMScheduler", timestep_spacing="linspace")
    scheduler.set_timesteps(10)
    t = scheduler.timesteps.numpy()
    assert t[0] - 1000 // 10 == 899
    assert t[1] == 888


def test_ddim_keeps_the_unclipped_epsilon_beside_a_clipped_x0():
    """By default its ε is not derived again from the clipped x_0, so x_s leaves its noise level.

    With use_clipped_model_output=True it is ours (see the parity tests).
    """
    clipped = Case(
        "DDIMScheduler", "ddim", {"clip_sample": True, "clip_sample_range": 0.5}, clip=0.5
    )
    same = Case(
        clipped.scheduler, "ddim", clipped.config,
        step_options={"use_clipped_model_output": True}, clip=0.5,
    )  # fmt: skip
    assert gap(clipped, "epsilon", "trailing").max() > 1e-2
    assert gap(same, "epsilon", "trailing").max() <= 1e-9


def test_plms_mixes_v_predictions_of_different_levels():
    """Its PNDM averages the raw answers; for v they mean different things at different levels.

    Ours averages ε, which is what PNDM eq. 9 and 12 integrate.
    """
    case = Case("PNDMScheduler", "plms", {"skip_prk_steps": True, "set_alpha_to_one": True})
    gaps = gap(case, "v_prediction", "leading")
    assert gaps[0] <= 1e-9  # one answer: nothing to mix
    assert gaps[1:].max() > 1e-2


def test_plms_on_linspace_steps_to_a_level_that_is_not_its_next_timestep():
    """The same arithmetic on timesteps as its DDIM."""
    case = Case("PNDMScheduler", "plms", {"skip_prk_steps": True, "set_alpha_to_one": True})
    assert gap(case, "epsilon", "linspace").max() > 1e-3


@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_with_bh1_ends_in_nan(order):
    """Its last step has h = ∞, and B(h) = −h times a difference of 0 is NaN: every image is lost.

    (solver_type="bh1" with the default final_sigmas_type="zero".) Ours is DDIM there.
    """
    case = Case(
        "UniPCMultistepScheduler", "unipc", {"solver_type": "bh1", "solver_order": order},
        {"solver_type": "bh1", "order": order},
    )  # fmt: skip
    ours, theirs = both(case, "epsilon", "trailing", EXACT)
    assert np.isnan(theirs[-1]).all()
    assert np.isfinite(ours).all()


def test_third_order_multistep_is_second_order_there():
    """DPM-Solver++(3M) as published weighs D_2 by φ_3 where the integral of u² gives 2·φ_3.

    Measured against the exact flow: halving the step divides its error by 4, ours by 8. Parity with
    theirs is kept under ``published=True``.
    """
    start, end = -4.0, 3.0
    x = np.linspace(-2.5, 2.5, 41)
    exact = mixture.exact_flow(x, start, end)

    def error(steps, published):
        trajectory = mixture.smooth_trajectory(np.linspace(start, end, steps + 1))
        program = compile_program("dpmpp_3m", trajectory, clip=np.inf, published=published)
        return np.abs(
            float64_lanes.run(program, mixture.network, x, np.zeros((steps, 1)))[-1] - exact
        ).max()

    assert np.log2(error(200, True) / error(400, True)) == pytest.approx(2.0, abs=0.2)
    assert np.log2(error(200, False) / error(400, False)) >= 2.6
    assert error(400, False) < error(400, True) / 10


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_sigma_schedulers_do_not_round_linspace(name):
    """They tell the network fractional timesteps, with σ (not log σ) linear in between."""
    with precision(name, EXACT):
        scheduler = make(name, timestep_spacing="linspace", **LINEAR)
        scheduler.set_timesteps(11)
    t = np.unique(scheduler.timesteps.numpy())[::-1]
    assert (np.round(t) == timestep_spacing("linspace", 1000, 11)).all()
    assert t[1] == pytest.approx(899.1)
    schedule = make_schedule()
    sigma = np.sqrt(1 / schedule.alphas_cumprod - 1)
    theirs = scheduler.sigmas.numpy()[1]
    assert theirs == pytest.approx(0.9 * sigma[899] + 0.1 * sigma[900], rel=1e-9)
    ours = discrete_trajectory(schedule, "epsilon", t)
    assert ours.noise[1] / ours.signal[1] == pytest.approx(
        sigma[899] ** 0.9 * sigma[900] ** 0.1, rel=1e-9
    )


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_multistep_schedulers_leave_out_the_last_timestep(name):
    """For S steps they take S + 1 timesteps of linspace and leading, and drop t = 0."""
    scheduler = make(name, timestep_spacing="linspace")
    scheduler.set_timesteps(10)
    assert (scheduler.timesteps.numpy() == timestep_spacing("linspace", 1000, 11)[:-1]).all()
    scheduler = make(name, timestep_spacing="leading")
    scheduler.set_timesteps(10)
    assert (scheduler.timesteps.numpy() == timestep_spacing("leading", 1000, 11)[:-1]).all()


def test_trailing_sometimes_visits_timestep_minus_one():
    """np.arange(T, 0, −T/S) overshoots for some S; ours stops after S timesteps."""
    scheduler = make("DDIMScheduler", timestep_spacing="trailing")
    overshot = []
    for steps in range(1, 1001):
        scheduler.set_timesteps(steps)
        if len(scheduler.timesteps) != steps:
            assert scheduler.timesteps[-1] == -1
            overshot.append(steps)
        assert timestep_spacing("trailing", 1000, steps)[-1] >= 0
    assert overshot


def test_karras_timesteps_are_rounded_for_the_network_but_not_for_the_solver():
    """Its network is told a level that differs from the solver's by up to half a timestep."""
    with precision("UniPCMultistepScheduler", EXACT):
        scheduler = make("UniPCMultistepScheduler", use_karras_sigmas=True, **LINEAR)
        scheduler.set_timesteps(10)
    schedule = make_schedule()
    ours = timestep_spacing("karras", 1000, 10, schedule)
    assert (np.round(ours) == scheduler.timesteps.numpy()).all()
    told = schedule.log_sigmas[scheduler.timesteps.numpy()]
    used = np.log(scheduler.sigmas.numpy()[:-1])
    assert np.abs(told - used).max() > 1e-2


def test_its_nearly_zero_terminal_snr_has_more_signal_than_the_timestep_before():
    """ᾱ_T = 2⁻²⁴ = 6·10⁻⁸, but ᾱ_{T−1} = 4·10⁻⁹: the noise levels go up, then down."""
    scheduler = make("DPMSolverMultistepScheduler", rescale_betas_zero_snr=True, **LINEAR)
    assert scheduler.alphas_cumprod[-1] > scheduler.alphas_cumprod[-2]
    ours = make_schedule(rescale_zero_terminal_snr=True)
    assert (np.diff(ours.alphas_cumprod) < 0).all()


def test_learned_variance_there_is_not_a_logarithm():
    """With "learned", improved-diffusion (and ours) read log σ²; diffusers reads σ² itself."""
    rng = np.random.default_rng(0)
    x_T, draws = rng.normal(size=64), rng.normal(size=(5, 64))
    v = rng.uniform(0.1, 1.0, size=(5, 64))
    program = compile_program(
        "ddpm",
        discrete_trajectory(make_schedule(), "epsilon", timestep_spacing("leading", 1000, 5)),
        clip=np.inf,
        variance="learned",
    )
    with precision("DDPMScheduler", EXACT) as module:
        scheduler = make("DDPMScheduler", variance_type="learned", clip_sample=False, **LINEAR)
        scheduler.set_timesteps(5)
        theirs = drive(
            scheduler, module,
            lambda x, signal, noise, i: np.concatenate([answer("epsilon", x, signal, noise), v[i]]),
            x_T, draws, EXACT,
        )  # fmt: skip

    def ours(told):
        registers, out = x_T[None], []
        for row in range(5):
            m = answer("epsilon", registers[0], program.signal[row], program.noise[row])
            registers = float64_lanes.advance(program, row, registers, m, draws[row], told[row])
            out.append(registers[0])
        return np.stack(out)

    assert np.abs(ours(v) - theirs).max() > 0.1
    assert np.abs(ours(np.log(v)) - theirs).max() <= 1e-9


def test_third_order_sde_there_is_not_consistent():
    """sde-dpmsolver++ of order 3 adds about −D_2 where the integral gives +H·φ_3·D_2, H = 2h.

    (Its term is (1 − e^(−H) − H)/H² − ½, with a minus that should be a plus.) We offer no such
    sampler; k-diffusion's 3M SDE has the published half weight instead.
    """
    h = 0.1
    H = 2 * h
    theirs = (1 - np.exp(-H) - H) / H**2 - 0.5
    right = (1 - np.exp(-H) - H) / H**2 + 0.5
    u, w = np.polynomial.legendre.leggauss(30)
    u, w = (u + 1) / 2, w / 2
    integral = (w * H * np.exp(-H * (1 - u)) * u**2).sum() / 2
    assert right == pytest.approx(integral, rel=1e-9)
    assert theirs < -0.9
    source = inspect.getsource(diffusers.DPMSolverMultistepScheduler)
    assert "(1.0 - torch.exp(-2.0 * h) - 2.0 * h) / (2.0 * h) ** 2 - 0.5" in source
