"""Starting from an image, keeping part of one, guiding part of the way, morphing, encoding."""

from __future__ import annotations

import numpy as np
import pytest

from ddpm_runtime import ConfigurationError, Engine, Settings
from ddpm_runtime.backends import FunctionBackend
from ddpm_runtime.interpolation import slerp
from ddpm_runtime.lanes import HostLanes, Known
from ddpm_runtime.noise import noise
from ddpm_runtime.samplers import SAMPLERS, build_program
from ddpm_runtime.samplers.inversion import build_inversion
from ddpm_runtime.schedule import make_schedule
from helpers.analytic import gaussian_epsilon

SCHEDULE = make_schedule()
IMAGE = (1, 8, 8)
MEAN, DEVIATION = 0.3, 0.2


def program(sampler="ddim", steps=50, **options):
    return build_program(
        sampler,
        schedule=SCHEDULE,
        prediction_type="epsilon",
        num_inference_steps=steps,
        clip=np.inf,
        **options,
    )


def gaussian_lanes(capacity):
    network = gaussian_epsilon(SCHEDULE, MEAN, DEVIATION)
    return HostLanes(FunctionBackend(network, IMAGE), capacity)


def finish(lanes):
    images = {}
    while lanes.active:
        images |= {finished.tag: finished.image for finished in lanes.advance()}
    return np.stack([images[tag] for tag in sorted(images)])


@pytest.fixture
def engine(tiny_engine_path):
    with Engine.load(tiny_engine_path) as loaded:
        yield loaded


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "repaint", "dpmpp_2m", "unipc"])
def test_known_pixels_come_out_exactly_and_independent_ones_as_if_nothing_were_known(sampler):
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, IMAGE).astype(np.float32)
    mask = np.zeros(IMAGE, np.float32)
    mask[:, :4] = 1
    results = []
    for known in (Known(image=image, mask=mask), None):
        lanes = gaussian_lanes(8)
        for i in range(8):
            lanes.start(program(sampler, 20), seed=0, index=i, known=known, tag=i)
        results.append(finish(lanes))
    painted, free = results
    assert (painted[:, :, :4] == image[:, :4]).all()
    # this network looks at each pixel alone, so what is known elsewhere must not matter at all
    assert (painted[:, :, 4:] == free[:, :, 4:]).all()


def test_the_known_part_is_on_its_noise_level_after_every_row():
    image = np.full(IMAGE, 0.5, np.float32)
    lanes = gaussian_lanes(1)
    made = program(steps=5)
    lanes.start(made, seed=3, index=9, known=Known(image=image, mask=np.ones_like(image)), tag=0)
    for row in range(5):
        x_t = lanes.images()[0]
        draw = row + 2**31
        z = noise(3, 9, draw, 64).reshape(IMAGE).astype(float)
        expected = made.signal[row] * image + made.noise[row] * z
        assert np.abs(x_t - expected).max() < 1e-6
        lanes.advance()


def test_a_soft_mask_blends_the_row_with_the_known_image():
    image = np.full(IMAGE, 0.5, np.float32)
    quarter = np.full(IMAGE, 0.25, np.float32)
    made = program(steps=1)
    lanes = gaussian_lanes(1)
    lanes.start(made, seed=0, index=0, known=Known(image=image, mask=quarter), tag=0)
    before = lanes.images()[0]
    blended = finish(lanes)[0]
    lanes.start(made, seed=0, index=0, initial=before, tag=0)
    assert np.abs(blended - (0.25 * image + 0.75 * finish(lanes)[0])).max() < 1e-5


def test_repaint_without_jumps_is_ddpm_and_with_them_walks_every_stretch_again():
    plain, ddpm = program("repaint", 20, jump_count=1), program("ddpm", 20)
    assert (plain.weights == ddpm.weights).all()
    assert plain.evaluates.all()
    jumping = program("repaint", 20, jump_length=5, jump_count=3)
    # three walks down three of the four stretches, one down the last
    assert jumping.evaluations == 3 * 15 + 5
    assert int((~jumping.evaluates).sum()) == 3 * 2


def test_repaint_keeps_the_marginal_distribution():
    lanes = gaussian_lanes(200)
    # DDPM's own variance comes out low by 1/steps or so: enough steps to leave a few per cent
    made = program("repaint", 500, jump_length=10, jump_count=2)
    for i in range(200):
        lanes.start(made, seed=1, index=i, tag=i)
    x = finish(lanes).astype(float)
    assert abs(x.mean() - MEAN) < 5 * DEVIATION / x.size**0.5 + 0.005
    assert abs(x.std() / DEVIATION - 1) < 0.08


def test_strength_one_is_plain_sampling_and_less_stays_nearer_to_the_image(engine):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (8, 8, 1), dtype=np.uint8)
    plain = engine.sample(4, steps=20)
    whole = engine.sample(4, steps=20, image=image, strength=1.0)
    assert (plain == whole).all()
    program_of = engine.program(steps=20, strength=0.25)
    assert program_of.timesteps.tolist() == engine.program(steps=20).timesteps[-5:].tolist()


def test_a_noisy_image_starts_exactly_on_its_level():
    # a network that predicts no noise at all leaves DDIM's x_0 at x_t / signal
    lanes = HostLanes(FunctionBackend(lambda x, t, y: 0 * x, IMAGE), 1)
    made = program(steps=10, strength=0.5)
    assert len(made) == 5
    image = np.full(IMAGE, 0.25, np.float32)
    z = noise(2, 4, 0, 64).reshape(IMAGE)
    initial = (made.signal[0] * image + made.noise[0] * z).astype(np.float32)
    lanes.start(made, seed=2, index=4, initial=initial, tag=0)
    assert np.abs(finish(lanes)[0] - initial / made.signal[0]).max() < 1e-4


def test_an_image_that_is_encoded_is_drawn_again_from_its_x_T():
    image = np.random.default_rng(0).normal(MEAN, DEVIATION, IMAGE).astype(np.float32)
    errors = []
    for steps in (50, 100, 200):
        up = build_inversion(
            schedule=SCHEDULE,
            prediction_type="epsilon",
            num_inference_steps=steps,
            spacing="linspace",
        )
        lanes = gaussian_lanes(1)
        lanes.start(up, seed=0, index=0, initial=up.table.signal[0] * image, tag=0)
        x_T = finish(lanes)[0]
        lanes.start(program(steps=steps, spacing="linspace"), seed=0, index=0, initial=x_T, tag=0)
        errors.append(float(np.abs(finish(lanes)[0] - image).max()))
        # sixty-four pixels of noise: the deviation of a standard normal within five of its errors
        assert abs(x_T.std() - 1) < 5 / np.sqrt(2 * 64)
    # first order: half the step, half the error
    assert errors[0] > 1.5 * errors[1] > 2.25 * errors[2]
    assert errors[2] < 0.04


def test_encode_and_sample_meet_in_the_engine(engine):
    images = engine.sample(2, label=[0, 1], guidance_scale=1.0)
    x_T = engine.encode(images, steps=50, label=[0, 1])
    assert x_T.shape == (2, 1, 8, 8)
    again = engine.sample(
        2, x_T=x_T, steps=50, label=[0, 1], guidance_scale=1.0, clip_denoised=False
    )
    assert again.shape == images.shape


def test_guidance_acts_only_inside_its_interval(engine):
    base = {"steps": 10, "label": 1, "guidance_scale": 4.0}
    everywhere = engine.sample(1, **base)
    assert (engine.sample(1, **base, guidance_interval=(0, 99)) == everywhere).all()
    nowhere = engine.sample(1, **base, guidance_interval=(95, 99))
    assert (nowhere == engine.sample(1, **{**base, "guidance_scale": 1.0})).all()
    some = engine.program(steps=10, guidance_interval=(30, 60))
    assert some.timesteps[some.guided].tolist() == [60, 50, 40, 30]


def test_slerp_walks_the_great_circle():
    a = noise(0, 0, 0, 4096).reshape(1, 64, 64)
    b = noise(0, 1, 0, 4096).reshape(1, 64, 64)
    walk = slerp(a, b, 9)
    assert np.abs(walk[0] - a).max() < 1e-6
    assert np.abs(walk[-1] - b).max() < 1e-6
    # equal angles between neighbours, and no dip in length in the middle
    flat = walk.reshape(9, -1).astype(float)
    lengths = np.linalg.norm(flat, axis=1)
    cosines = [(flat[i] @ flat[i + 1]) / (lengths[i] * lengths[i + 1]) for i in range(8)]
    angles = np.arccos(cosines)
    assert np.ptp(angles) < 0.01
    assert lengths.min() > 0.97 * lengths[0]
    assert np.abs(slerp(a, a, 3) - a).max() < 1e-6
    with pytest.raises(ConfigurationError, match="n ≥ 2"):
        slerp(a, b, 1)


UINT8 = np.zeros((8, 8, 1), np.uint8)
BAD = {
    "strength above one": ({"image": UINT8, "strength": 1.5}, "nearest valid choice is 1"),
    "strength zero": ({"image": UINT8, "strength": 0.0}, r"\(0, 1\]"),
    "strength without image": ({"strength": 0.5}, "give image"),
    "mask without image": ({"mask": np.ones((8, 8))}, "give image"),
    "image alone": ({"image": UINT8}, "strength"),
    "mask of another shape": (
        {"image": UINT8, "mask": np.ones((4, 4))},
        r"mask must be \(8, 8\).*got shape \(4, 4\)",
    ),
    "mask outside [0, 1]": ({"image": UINT8, "mask": np.full((8, 8), 2.0)}, r"\[0, 1\]"),
    "image of another size": ({"image": UINT8[:4], "strength": 0.5}, "8, 8, 1"),
    "image in float64": ({"image": np.zeros((1, 8, 8)), "strength": 0.5}, "uint8 or float32"),
    "image with NaN": (
        {"image": np.full((1, 8, 8), np.nan, np.float32), "strength": 0.5},
        "without NaN",
    ),
    "two images for three": (
        {"n": 3, "image": np.zeros((2, 8, 8, 1), np.uint8), "strength": 0.5},
        "1 or 3",
    ),
    "image and x_T": (
        {"image": UINT8, "strength": 0.5, "x_T": np.zeros((1, 1, 8, 8), np.float32)},
        "not both",
    ),
    "x_T of another shape": ({"x_T": np.zeros((2, 1, 8, 8), np.float32)}, r"\(1, 1, 8, 8\)"),
    "interval upside down": ({"label": 0, "guidance_interval": (9, 3)}, "lowest first"),
    "a setting nobody has": ({"step": 5}, "Did you mean 'steps'"),
    "jump of no length": (
        {"sampler": "repaint", "sampler_options": {"jump_length": 0}},
        "jump_length",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_condition_is_refused_with_the_remedy(engine, kind):
    request, remedy = BAD[kind]
    with pytest.raises(ConfigurationError, match=remedy):
        engine.sample(**request)


def test_settings_can_be_kept_and_changed(engine):
    kept = Settings(steps=5, label=1, seed=3)
    assert (engine.sample(2, kept) == engine.sample(2, steps=5, label=1, seed=3)).all()
    assert (engine.sample(2, kept, seed=4) == engine.sample(2, steps=5, label=1, seed=4)).all()


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_every_sampler_runs_in_the_engine_and_ignores_the_batch_size(engine, sampler):
    options = {"sampler": sampler, "steps": 6, "label": "all", "output": "float32"}
    together = engine.sample(5, **options, batch_size=5)
    apart = engine.sample(5, **options, batch_size=2)
    assert np.isfinite(together).all()
    assert (together == apart).all()
