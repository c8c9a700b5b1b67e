"""Reliability R1: every coefficient of every row, found by probing, is the paper's.

A program is linear in x_T, the network's answers and the noise (unclipped), so running it once on
unit vectors gives every coefficient of every row. The oracle's loop runs on the same unit vectors.
"""

from __future__ import annotations

import numpy as np
import pytest

from ddpm_runtime.backends.function import FunctionBackend
from ddpm_runtime.lanes import HostLanes
from ddpm_runtime.noise import noise
from ddpm_runtime.samplers import SAMPLERS, build_program, compile_program
from ddpm_runtime.schedule import make_schedule
from helpers import float64_lanes, mixture, oracles, solver_oracles
from helpers.worlds import CASES, LINEAR, WORLDS, World

# float64 and a few hundred operations; R1 asks for 1e-10
TOLERANCE = 1e-10


def unit_runs(rows):
    """x_T, answers and noise as unit vectors of one long space."""
    unit = np.eye(1 + 2 * rows)
    return unit[0], unit[1 : 1 + rows], unit[1 + rows :]


def relative_error(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    scale = np.maximum(
        1.0, np.abs(expected).max(axis=tuple(range(1, expected.ndim)), keepdims=True)
    )
    return float((np.abs(found - expected) / scale).max())


@pytest.mark.parametrize("world", WORLDS, ids=lambda w: w.name)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_coefficient_of_every_row_is_the_papers(case, world, figures, here):
    trajectory = world.trajectory
    program = compile_program(case.sampler, trajectory, clip=np.inf, **case.options)
    visited = case.visits(world, [float(t) for t in trajectory.timesteps])
    # bisection in the oracle's world ends within 1e-13 of T = 1000 timesteps
    assert np.allclose(program.timesteps, visited, rtol=0, atol=1e-8)
    levels = world.levels(visited)
    assert np.allclose(program.signal, [a for a, _ in levels], rtol=1e-10, atol=0)
    assert np.allclose(program.noise, [s for _, s in levels], rtol=1e-10, atol=0)

    x_T, m, z = unit_runs(len(program))
    found = float64_lanes.run(program, lambda x, t, row: m[row], x_T, z)
    denoise = world.denoise(lambda x, k: m[k], levels)
    expected = case.oracle(levels, denoise, x_T, z, **case.oracle_options)
    error = relative_error(found, expected)
    figures.worst("coefficients of every row of every sampler", error, TOLERANCE, here)
    assert error <= TOLERANCE


@pytest.mark.parametrize("world", [WORLDS[0], WORLDS[4], WORLDS[-1]], ids=lambda w: w.name)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_clipping_bounds_x0_and_what_is_derived_from_it(case, world):
    trajectory = world.trajectory
    program = compile_program(case.sampler, trajectory, clip=0.7, **case.options)
    visited = case.visits(world, [float(t) for t in trajectory.timesteps])
    levels = world.levels(visited)
    rng = np.random.default_rng(0)
    m, z = rng.normal(size=(2, len(program), 50))
    x_T = rng.normal(size=50) * levels[0][1]
    found = float64_lanes.run(program, lambda x, t, row: m[row], x_T, z)
    denoise = world.denoise(lambda x, k: m[k], levels, clip=0.7)
    expected = case.oracle(levels, denoise, x_T, z, **case.oracle_options)
    assert relative_error(found, expected) <= TOLERANCE
    unclipped = float64_lanes.run(
        compile_program(case.sampler, trajectory, clip=np.inf, **case.options),
        lambda x, t, row: m[row],
        x_T,
        z,
    )
    assert np.abs(found - unclipped).max() > 1e-3  # the bound was met


def test_no_sampler_escapes_the_oracles():
    # repaint (rows without a network call) has its own tests with the conditions
    assert {case.sampler for case in CASES} == set(SAMPLERS) - {"repaint"}


def test_edm_networks_are_told_what_table_1_says():
    world = WORLDS[-1]
    program = compile_program("euler", world.trajectory)
    sigma = program.noise[:-1]
    assert np.allclose(program.timesteps, np.log(sigma) / 4, rtol=1e-14)
    assert np.allclose(program.input_scale, (sigma**2 + 0.36) ** -0.5, rtol=1e-14)
    assert program.initial_scale == 80.0


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    ("sampler", "options"),
    [("ddpm", {}), ("ddpm", {"variance": "fixed_large"})]
    + [("ddim", {"eta": eta}) for eta in (0.0, 0.5, 1.0)],
    ids=str,
)
@pytest.mark.parametrize("name", ["linear", "cosine", "scaled_linear", "sigmoid"])
def test_each_of_a_thousand_timesteps_has_the_papers_coefficients(
    name, sampler, options, prediction_type, figures, here
):
    """One row at a time on the unit vectors of (x_t, m, z), for every t of T = 1000."""
    schedule = make_schedule(name)
    program = build_program(
        sampler, schedule=schedule, prediction_type=prediction_type, num_inference_steps=1000,
        clip=np.inf, **options,
    )  # fmt: skip
    unit = np.eye(3)
    worst = 0.0
    logs = np.cumsum(np.log1p(-schedule.betas))
    for row in range(1000):
        t = 999 - row
        level = (
            [np.exp(logs[i] / 2) for i in (t, t - 1)],
            [(-np.expm1(logs[i])) ** 0.5 for i in (t, t - 1)],
        )
        levels = list(zip(*level, strict=True)) if t else [(level[0][0], level[1][0]), (1.0, 0.0)]
        denoise = oracles.denoise_from(lambda x, k: unit[1], levels, prediction_type)
        (expected,) = getattr(oracles, sampler)(levels, denoise, unit[0], unit[2:], **options)
        found = float64_lanes.advance(program, row, unit[:1], unit[1], unit[2])[0]
        worst = max(worst, np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))
    figures.worst("coefficients of each of 1,000 timesteps", worst, TOLERANCE, here)
    assert worst <= TOLERANCE


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
@pytest.mark.parametrize("world", WORLDS, ids=lambda w: w.name)
def test_learned_variances_are_read_as_the_paper_says(variance, world):
    program = compile_program("ddpm", world.trajectory, clip=np.inf, variance=variance)
    assert program.learns_variance
    levels = world.levels([float(t) for t in world.trajectory.timesteps])
    rng = np.random.default_rng(1)
    m, z, v = rng.uniform(-1, 1, size=(3, len(program), 64))
    x = found = rng.normal(size=64)
    expected = oracles.ddpm(
        levels, world.denoise(lambda x, k: m[k], levels), x, z, variance=variance, v=v
    )
    registers = found[None]
    for row in range(len(program)):
        registers = float64_lanes.advance(program, row, registers, m[row], z[row], v[row])
        assert np.allclose(registers[0], expected[row], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("world", [w for w in WORLDS if w.steps > 1], ids=lambda w: w.name)
def test_the_last_learned_range_is_that_of_the_decoder(world):
    """No noise is drawn there; a density needs β of that step, and β̃ of the one before."""
    program = compile_program("ddpm", world.trajectory, variance="learned_range")
    levels = world.levels([float(t) for t in world.trajectory.timesteps])
    _, small = oracles.conditional(0.0, 0.0, levels[-3], levels[-2])
    assert program.log_sigma_min[-1] == pytest.approx(np.log(small) / 2, abs=1e-10)
    assert program.log_sigma_max[-1] == pytest.approx(np.log(levels[-2][1]), abs=1e-10)
    assert not program.weights[-1, 0, -1].any()


@pytest.mark.parametrize("sampler", sorted(SAMPLERS.keys() - {"langevin", "repaint"}))
def test_without_signal_the_first_step_is_ddim_and_history_starts_after_it(sampler):
    """Zero terminal SNR: λ_0 = −∞. Row 0 keeps x_T as ε; then the sampler starts afresh."""
    world = World("", LINEAR | {"rescale_zero_terminal_snr": True}, "trailing", 9, "v_prediction")
    program = compile_program(sampler, world.trajectory, clip=np.inf)
    assert program.signal[0] == 0.0
    begin = 1
    if sampler == "predictor_corrector":  # its Langevin rows at level 0 come first
        begin = 2
    rng = np.random.default_rng(2)
    x_0, x_T, z = rng.normal(size=(3, 16))
    registers = np.zeros((program.registers, 16))
    registers[0] = x_T
    after = float64_lanes.advance(
        program, begin - 1, registers, -x_0, z
    )  # v = −x_0 where signal = 0
    signal, noise = program.signal[begin], program.noise[begin]
    stochastic = SAMPLERS[sampler].stochastic
    assert np.allclose(after[0], signal * x_0 + noise * (z if stochastic else x_T), atol=1e-12)
    if sampler in {"ipndm", "plms"}:  # ε is known at level 0 and stays in history
        assert np.allclose(after[1], x_T, atol=1e-12)
        levels = world.levels([float(t) for t in world.trajectory.timesteps[1:]])
        old, x = [x_T], after[0]
        m = rng.normal(size=(len(program), 16))
        denoise = world.denoise(lambda x, k: m[k], levels)
        registers = after
        for k in range(8):
            registers = float64_lanes.advance(program, k + 1, registers, m[k], z)
            x, old = solver_oracles.adams_step(x, old, denoise, k, levels[k], levels[k + 1], 4)
            assert np.allclose(registers[0], x, atol=1e-10)
        return
    later = world.trajectory.take(range(1, 9))
    afresh = compile_program(sampler, later, clip=np.inf)
    rest = program.weights[begin:]
    m, z = rng.normal(size=(2, len(rest), 16))
    continued = []
    registers = after
    for k in range(len(rest)):
        registers = float64_lanes.advance(program, begin + k, registers, m[k], z[k])
        continued.append(registers[0])
    expected = float64_lanes.run(afresh, lambda x, t, row: m[row], after[0], z)
    assert np.allclose(continued, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("world", [WORLDS[2], WORLDS[5]], ids=lambda w: w.name)
@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_the_shipped_executor_runs_every_sampler_as_float64_does(sampler, world):
    """HostLanes in float32 against the float64 reading, on the library's own noise."""
    schedule = make_schedule(**world.schedule)
    program = compile_program(sampler, world.trajectory, clip=1.0)
    shape = (1, 4, 4)

    def perfect(x, timestep):
        a = schedule.alphas_cumprod_at(np.atleast_1d(timestep).astype(np.float64))
        a = a.reshape(-1, *[1] * (np.ndim(x) - 1))
        return mixture.denoiser(x, np.sqrt(a)[..., None], np.sqrt(1 - a)[..., None])

    lanes = HostLanes(FunctionBackend(lambda x, t, label: perfect(x, t), shape), 3)
    for index in range(3):
        lanes.start(program, seed=11, index=index, tag=index)
    finished = {}
    while lanes.active:
        finished |= {lane.tag: lane.image for lane in lanes.advance()}
    for index in range(3):
        draws = [noise(11, index, k, 16).reshape(shape) for k in range(len(program) + 1)]
        x = float64_lanes.run(
            program, lambda x, t, row: perfect(x[None], t)[0], draws[0], draws[1:]
        )
        # float32 tables and arithmetic over some tens of contracting rows
        assert np.abs(finished[index] - x[-1]).max() <= 2e-5
