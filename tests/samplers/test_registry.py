"""Names, aliases, options, and what a wrong one is answered with."""

from __future__ import annotations

import inspect
import re

import numpy as np
import pytest
from click.testing import CliRunner

from ddpm_runtime.cli import run
from ddpm_runtime.errors import ConfigurationError
from ddpm_runtime.samplers import (
    ALIASES,
    SAMPLERS,
    build_program,
    compile_program,
    resolve_sampler,
)
from ddpm_runtime.schedule import SPACINGS, karras_sigmas, make_schedule
from ddpm_runtime.trajectory import edm_trajectory

SCHEDULE = make_schedule("linear", 100)


def build(sampler="ddim", steps=10, **options):
    return build_program(
        sampler,
        schedule=SCHEDULE,
        prediction_type="epsilon",
        num_inference_steps=steps,
        **options,
    )


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_the_list_says_what_the_program_does(name):
    sampler = SAMPLERS[name]
    S = 50
    program = build(name, S)
    assert program.sampler == name
    assert program.evaluations == pytest.approx(S * sampler.evaluations_per_step, rel=0.2)
    assert sampler.stochastic == bool(program.weights[..., -1].any())
    assert 1 <= sampler.recommended_steps <= 1000
    assert sampler.order in (1, 2, 3)
    assert sampler.recommended_spacing in SPACINGS
    assert "arXiv" in sampler.source or "k-diffusion" in sampler.source
    assert program.table.clip.tolist() == [1.0] * len(program)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_options_are_those_of_the_compiler(name):
    sampler = SAMPLERS[name]
    parameters = inspect.signature(sampler.build).parameters
    assert list(parameters)[:2] == ["trajectory", "clip"]
    assert list(sampler.options) == list(parameters)[2:]
    explicit = build(name, **sampler.options)
    assert (explicit.weights == build(name).weights).all()


@pytest.mark.parametrize("alias", sorted(ALIASES))
def test_every_alias_is_one_of_ours_with_options_it_takes(alias):
    name, options = resolve_sampler(alias)
    assert name in SAMPLERS
    assert set(options) <= set(SAMPLERS[name].options)
    assert (build(alias).weights == build(name, **options).weights).all()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("DDIMScheduler", ("ddim", {})),
        ("DPMSolverMultistepScheduler", ("dpmpp_2m", {})),
        ("UniPCMultistepScheduler", ("unipc", {})),
        ("dpmpp_2m", ("dpmpp_2m", {})),
        ("DPM++ 2M", ("dpmpp_2m", {})),
        ("dpm-solver++ 3M", ("dpmpp_3m", {})),
        ("DPM-Solver++ SDE-2M", ("dpmpp_2m_sde", {})),
        ("DPM-Solver 3S", ("dpm_solver_3s", {})),
        ("Euler-ancestral", ("euler_ancestral", {})),
        ("annealed Langevin", ("langevin", {})),
        ("PLMS", ("plms", {})),
        ("Euler a", ("euler_ancestral", {})),
        ("sample_euler_ancestral", ("euler_ancestral", {})),
        ("predictor-corrector", ("predictor_corrector", {})),
        ("UNIPC_3", ("unipc", {"order": 3})),
        ("uni-pc-bh1", ("unipc", {"solver_type": "bh1"})),
        ("iPNDM 2", ("ipndm", {"order": 2})),
        ("ddpm", ("ddpm", {})),
        ("DDPM", ("ddpm", {})),
        ("Heun", ("heun", {})),
    ],
)
def test_names_are_understood_in_the_spellings_people_use(typed, meant):
    assert resolve_sampler(typed) == meant


def test_what_the_user_says_wins_over_what_an_alias_implies():
    assert (build("unipc_3", order=2).weights == build("unipc", order=2).weights).all()
    assert build("unipc_3").registers == 4


def test_no_alias_hides_a_sampler_or_shares_its_options():
    for alias, (name, _) in ALIASES.items():
        assert alias not in SAMPLERS
        assert name in SAMPLERS
    resolve_sampler("unipc_3")[1]["order"] = 1
    assert resolve_sampler("unipc_3")[1] == {"order": 3}


# --- refusals: what was asked, what is possible, the nearest valid choice ------------------------


IMPOSSIBLE = [
    ({"sampler": "dimm"}, "unknown sampler 'dimm'.*ddpm.*Did you mean 'ddim'"),
    ({"sampler": "DPMSolverMultistepSchedular"}, "Did you mean 'DPMSolverMultistepScheduler'"),
    ({"steps": 101}, "between 1 and 100.*got 101.*nearest valid choice is 100"),
    ({"steps": 0}, "got 0.*nearest valid choice is 1"),
    ({"spacing": "karas"}, "Did you mean 'karras'"),
    ({"etaa": 0.5}, "unknown option of the ddim sampler 'etaa'.*Did you mean 'eta'"),
    ({"eta": 1.5}, r"eta must lie in \[0, 1\].*got 1.5.*nearest valid choice is 1"),
    ({"eta": -0.1}, "got -0.1.*nearest valid choice is 0"),
    ({"eta": float("nan")}, "got nan"),
    ({"sampler": "euler_ancestral", "eta": 2.0}, "nearest valid choice is 1"),
    ({"sampler": "dpmpp_2m_sde", "eta": 2.0}, "nearest valid choice is 1"),
    ({"sampler": "unipc", "order": 4}, "one of 1, 2, 3.*got 4.*nearest valid choice is 3"),
    ({"sampler": "unipc", "order": 0}, "got 0.*nearest valid choice is 1"),
    ({"sampler": "ipndm", "order": 5}, "one of 1, 2, 3, 4.*got 5.*nearest valid choice is 4"),
    ({"sampler": "unipc", "solver_type": "bh3"}, "unknown solver type.*bh1, bh2"),
    ({"sampler": "dpmpp_2m", "solver_type": "midpont"}, "Did you mean 'midpoint'"),
    ({"sampler": "dpmpp_3s", "solver_type": "taylor"}, "heun, midpoint"),
    ({"sampler": "ddpm", "variance": "fixedsmall"}, "Did you mean 'fixed_small'"),
    ({"sampler": "langevin", "inner_steps": 0}, "≥ 1; got 0.*nearest valid choice is 1"),
    ({"sampler": "langevin", "step_size": 2.5}, r"\(0, 2\]; got 2.5.*choice is 2"),
    ({"sampler": "langevin", "step_size": 0.0}, r"\(0, 2\]; got 0.0"),
    ({"sampler": "predictor_corrector", "corrector_steps": -1}, "≥ 0; got -1.*choice is 0"),
    ({"sampler": "predictor_corrector", "snr": 0.71}, r"\(0, 0.7\]; got 0.71.*choice is 0.7"),
    ({"sampler": "predictor_corrector", "snr": float("nan")}, "got nan"),
    ({"sampler": "predictor_corrector", "snr": 0.0}, r"\(0, 0.7\]; got 0.0.*choice is 0.01"),
    ({"sampler": "repaint", "jump_length": 0}, "≥ 1; got 0 and 10"),
    ({"sampler": "repaint", "jump_count": 0}, "≥ 1; got 10 and 0"),
    ({"strength": 0.0}, r"strength must lie in \(0, 1\].*got 0.0.*nearest valid choice is 0.1"),
    ({"strength": -1.0}, r"\(0, 1\].*got -1.0.*nearest valid choice is 0.1"),
    ({"strength": 1.01}, r"\(0, 1\].*got 1.01.*nearest valid choice is 1"),
    ({"strength": float("nan")}, "got nan"),
    ({"guidance_interval": (-1, 5)}, r"two timesteps, lowest first; got \(-1, 5\)"),
    ({"guidance_interval": (6, 5)}, r"lowest first; got \(6, 5\)"),
    # of the wrong kind, as a command line may give them
    ({"eta": "half"}, "option eta of the ddim sampler must be a number; got 'half'.*is 0.0"),
    ({"eta": True}, "must be a number; got True"),
    ({"sampler": "unipc", "order": "three"}, "one of 1, 2, 3; got 'three'.*is 2"),
    ({"sampler": "unipc", "order": True}, "one of 1, 2, 3; got True"),
    ({"sampler": "ddpm", "variance": 1}, "one of fixed_small, fixed_large.*got 1.*fixed_small"),
    ({"sampler": "langevin", "inner_steps": 2.5}, "a whole number; got 2.5.*is 5"),
    ({"sampler": "dpmpp_3m", "published": "False"}, "true or false; got 'False'.*is False"),
]


@pytest.mark.parametrize(
    ("arguments", "message"),
    IMPOSSIBLE,
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_impossible_requests_say_what_is_possible(arguments, message):
    with pytest.raises(ConfigurationError, match=f"(?s){message}"):
        build(**arguments)


@pytest.mark.parametrize(
    "arguments", [arguments for arguments, message in IMPOSSIBLE if "choice is" in message], ids=str
)
def test_the_nearest_valid_choice_is_valid(arguments):
    with pytest.raises(ConfigurationError) as refused:
        build(**arguments)
    nearest = float(re.search(r"nearest valid choice is ([\d.]*\d)", str(refused.value))[1])
    (wrong,) = set(arguments) - {"sampler"}
    build(**arguments | {wrong: int(nearest) if nearest == int(nearest) else nearest})


def test_the_limits_themselves_are_accepted():
    build("langevin", inner_steps=1, step_size=2.0)
    build("predictor_corrector", corrector_steps=0, snr=0.7)
    build("predictor_corrector", snr=1e-6)
    build("repaint", jump_length=1, jump_count=1)
    for eta in (0.0, 1.0):
        build("ddim", eta=eta)
    build(steps=1)
    build(steps=100)


def test_guidance_acts_inside_its_interval_both_ends_included():
    whole = build(guidance_interval=(0, 99))
    assert whole.guided.all()
    some = build(guidance_interval=(30, 60))
    assert some.timesteps[some.guided].tolist() == [60, 50, 40, 30]
    assert build(guidance_interval=(50, 50)).guided.sum() == 1
    assert build().guided is None


@pytest.mark.parametrize(("strength", "kept"), [(1.0, 10), (0.5, 5), (0.26, 3), (0.01, 1)])
def test_strength_keeps_the_last_of_the_steps(strength, kept):
    part = build("ddim", strength=strength)
    assert part.timesteps.tolist() == build("ddim").timesteps[-kept:].tolist()


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_repaint_walks_down_with_the_variance_ddpm_would_have(variance):
    """The jumps up draw plain noise, whatever the network says of its variance."""
    plain = build("ddpm", variance=variance)
    straight = build("repaint", variance=variance, jump_count=1)
    painted = build("repaint", variance=variance, jump_length=3, jump_count=2)
    for name in ("log_sigma_min", "log_sigma_max"):
        assert (getattr(straight, name) == getattr(plain, name)).all()
        below = {t: getattr(plain, name)[row] for row, t in enumerate(plain.timesteps)}
        down = painted.evaluates
        expected = [below[t] for t in painted.timesteps[down]]
        assert getattr(painted, name)[down].tolist() == expected
        assert not getattr(painted, name)[~down].any()
    assert not build("repaint").learns_variance


# --- what can be chosen is said ------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_every_choice_that_is_listed_is_accepted(name):
    sampler = SAMPLERS[name]
    for option, possible in sampler.choices.items():
        assert sampler.options[option] in possible
        for value in possible:
            build(name, **{option: value})


def test_the_command_lists_every_option_with_its_choices():
    listing = CliRunner().invoke(run, ["--list-samplers"]).output.splitlines()
    assert "    variance=fixed_small  or fixed_large, learned, learned_range" in listing
    assert "    order=2  or 1, 3" in listing
    assert "    solver_type=bh2  or bh1" in listing
    assert "    published=false  or true" in listing
    assert "    eta=0.0" in listing
    for name, sampler in SAMPLERS.items():
        at = next(i for i, line in enumerate(listing) if line.split()[:1] == [name])
        words = listing[at].split()
        stochastic = "yes" if sampler.stochastic else "no"
        numbers = (
            sampler.order,
            sampler.evaluations_per_step,
            stochastic,
            sampler.recommended_steps,
        )
        assert words[1:5] == [str(number) for number in numbers]
        assert sampler.source in listing[at]
        below = listing[at + 1 : at + 1 + len(sampler.options)]
        assert [line.strip().split("=")[0] for line in below] == list(sampler.options)


def test_langevin_needs_signal_at_every_level():
    rescaled = make_schedule("linear", 100, rescale_zero_terminal_snr=True)
    with pytest.raises(ConfigurationError, match="zero terminal SNR"):
        build_program(
            "langevin",
            schedule=rescaled,
            prediction_type="sample",
            num_inference_steps=10,
            spacing="trailing",
        )


def test_clipping_is_on_unless_told_otherwise():
    trajectory = edm_trajectory(karras_sigmas(4))
    assert compile_program("heun", trajectory).clip.tolist() == [1.0] * 7
    assert (compile_program("heun", trajectory, clip=np.inf).clip == np.inf).all()


# --- the defaults people rely on -----------------------------------------------------------------


def test_ddim_is_deterministic_unless_asked():
    assert not build("ddim").weights[..., -1].any()
    assert (build("ddim").weights == build("ddim", eta=0.0).weights).all()


def test_euler_and_its_ancestor_are_ddim_by_another_name():
    assert (build("euler").weights == build("ddim").weights).all()
    assert (build("euler_ancestral").weights == build("ddim", eta=1.0).weights).all()
    assert np.allclose(build("ddpm").weights, build("ddim", eta=1.0).weights, atol=1e-15)


def test_multiple_evaluations_cost_what_the_papers_say():
    assert len(build("heun", 10)) == 2 * 10 - 1
    assert len(build("dpmpp_2s", 10)) == 2 * 10 - 1
    assert len(build("dpm_solver_3s", 10)) == 3 * 10 - 2
    assert len(build("plms", 10)) == 10 + 1
    assert len(build("langevin", 10, inner_steps=3)) == 3 * 10 + 1
    assert len(build("predictor_corrector", 10, corrector_steps=2)) == 3 * 10
    assert len(build("unipc", 10)) == len(build("dpmpp_3m", 10)) == 10
