"""Programs check themselves: what no correct sampler breaks, and that breaking it is noticed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ddpm_runtime.errors import ConfigurationError
from ddpm_runtime.program import MAX_REGISTERS, SamplerProgram
from ddpm_runtime.samplers import SAMPLERS, build_program, compile_program
from ddpm_runtime.schedule import SPACINGS, karras_sigmas, make_schedule
from ddpm_runtime.trajectory import edm_trajectory

SINGLE = ("input_scale", "x0_from_x", "x0_from_m", "clip")
KEPT = {name for name in SAMPLERS if name not in {"langevin", "predictor_corrector"}}


def program(sampler="dpmpp_2m_sde", **options):
    return build_program(
        sampler,
        schedule=make_schedule("linear", 100),
        prediction_type="epsilon",
        num_inference_steps=10,
        **options,
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("spacing", sorted(SPACINGS))
@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_every_sampler_passes_its_own_checks_on_every_spacing(sampler, spacing, prediction_type):
    schedule = make_schedule("cosine", 60)
    for steps in (1, 2, 3, 14, 15, 60):
        compiled = build_program(
            sampler,
            schedule=schedule,
            prediction_type=prediction_type,
            num_inference_steps=steps,
            spacing=spacing,
        )
        assert compiled.registers <= MAX_REGISTERS
        assert compiled.keeps_variance == (sampler in KEPT)
        assert (compiled.signal[-1], compiled.noise[-1]) == (1.0, 0.0)
        assert not compiled.weights[-1, 0, -1].any()  # the last step adds no noise
        for column in vars(compiled.table).values():
            assert np.isfinite(column[column != np.inf]).all()


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_every_sampler_passes_its_own_checks_on_edm_networks(sampler):
    for steps in (1, 2, 18):
        compile_program(sampler, edm_trajectory(karras_sigmas(steps)))


def test_only_fixed_large_and_langevin_are_excused_from_keeping_variance():
    assert program("ddpm").keeps_variance
    assert not program("ddpm", variance="fixed_large").keeps_variance
    for variance in ("learned", "learned_range"):
        assert program("ddpm", variance=variance).learns_variance
    assert not program("ddpm").learns_variance


@pytest.mark.parametrize("row", [0, 4, 9])
@pytest.mark.parametrize("column", ["r_0", "r_1", "x0", "z"])
def test_a_part_in_a_million_in_any_weight_is_refused(row, column):
    good = program()
    if (row == 9 and column in {"r_0", "z"}) or (row in (0, 9) and column == "r_1"):
        pytest.skip("that weight is 0 there")
    weights = good.weights.copy()
    at = {"r_0": 0, "r_1": 1, "x0": 3, "z": 4}[column]
    weights[row, 0, at] *= 1 + 1e-6
    with pytest.raises(ConfigurationError, match=f"row {row} leaves (signal|noise) level"):
        replace(good, weights=weights)


def test_a_wrong_history_register_is_noticed_where_it_is_used():
    good = program()
    weights = good.weights.copy()
    weights[3, 1] *= 1.001
    with pytest.raises(ConfigurationError, match="row 4 leaves signal level"):
        replace(good, weights=weights)


def test_variance_is_checked_apart_from_the_image():
    """Moving weight from x_t to x_0 keeps a constant image and loses noise."""
    good = program("ddim")
    weights = good.weights.copy()
    weights[5, 0, 0] -= 0.001
    weights[5, 0, 2] += 0.001 * good.signal[5]
    with pytest.raises(ConfigurationError, match="row 5 leaves noise level"):
        replace(good, weights=weights)
    replace(good, weights=weights, keeps_variance=False)


@pytest.mark.parametrize(
    "column",
    [
        "input_scale",
        "x0_from_x",
        "x0_from_m",
        "clip",
        "weights",
        "signal",
        "noise",
        "evaluates",
        "guided",
    ],
)
def test_columns_of_another_length_are_refused_by_name(column):
    good = program()
    value = getattr(good, column)
    value = np.ones(11, bool) if value is None else value[:-1]
    with pytest.raises(ConfigurationError, match=f"column {column} has shape"):
        replace(good, **{column: value})


@pytest.mark.parametrize("column", ["timesteps", "input_scale", "x0_from_x", "signal", "weights"])
def test_numbers_that_are_not_finite_are_refused_by_row(column):
    good = program()
    value = getattr(good, column).copy()
    value[3] = np.nan
    with pytest.raises(ConfigurationError, match=f"column {column} is not finite at row 3"):
        replace(good, **{column: value})


def test_learned_variance_columns_are_checked_too():
    good = program("ddpm", variance="learned_range")
    with pytest.raises(ConfigurationError, match="log_sigma_max has shape"):
        replace(good, log_sigma_max=good.log_sigma_max[1:])


@pytest.mark.parametrize("clip", [0.0, -1.0, np.nan])
def test_clip_must_be_positive(clip):
    with pytest.raises(ConfigurationError, match="clip must be positive"):
        program(clip=clip)


def test_too_many_registers_are_refused():
    good = program("ipndm")
    weights = np.zeros((10, 5, 8))
    with pytest.raises(ConfigurationError, match="5 registers; executors hold 1 to 4"):
        replace(good, weights=weights)


def test_rows_without_a_network_call_are_counted_and_checked():
    """A row that only diffuses: x_s = a·x_t + b·z."""
    a = 0.8
    signal, noise = np.array([0.9, 0.9 * a]), np.array([0.19**0.5, (1 - 0.81 * a**2) ** 0.5])
    weights = np.zeros((1, 1, 4))
    weights[0, 0] = a, 0, 0, (noise[1] ** 2 - (a * noise[0]) ** 2) ** 0.5
    columns = {name: np.ones(1) for name in ("input_scale", "x0_from_x", "x0_from_m", "clip")}
    up = SamplerProgram(
        sampler="up",
        timesteps=np.zeros(1),
        weights=weights,
        signal=signal,
        noise=noise,
        evaluates=np.array([False]),
        **columns,
    )
    assert up.evaluations == 0
    assert not up.table.evaluates.any()
    weights = weights.copy()
    weights[0, 0, 3] *= 1.01
    with pytest.raises(ConfigurationError, match="noise level"):
        replace(up, weights=weights)


def test_the_table_is_the_program_in_float32():
    compiled = program("unipc", order=3)
    table = compiled.table
    for name, column in vars(table).items():
        if name in {"evaluates", "guided", "shallow"}:
            assert column.dtype == np.bool_
            assert (column == (name != "shallow")).all()
            continue
        assert column.dtype == np.float32
        own = getattr(compiled, name)
        expected = np.zeros(10) if own is None else own
        assert (column == expected.astype(np.float32)).all()
    assert compiled.evaluations == len(compiled) == 10
    learned = program("ddpm", variance="learned_range")
    assert (learned.table.log_sigma_min == learned.log_sigma_min.astype(np.float32)).all()
    assert (learned.table.log_sigma_max > learned.table.log_sigma_min)[:-1].all()
