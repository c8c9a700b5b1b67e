"""ddpm_runtime/lanes.py: the loop, against its written definition, and its promises."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ddpm_runtime.backends import FunctionBackend
from ddpm_runtime.errors import ConfigurationError, LifecycleError
from ddpm_runtime.lanes import HostLanes
from ddpm_runtime.noise import noise
from ddpm_runtime.program import SamplerProgram
from ddpm_runtime.samplers import build_program
from ddpm_runtime.schedule import make_schedule
from helpers.analytic import gaussian_epsilon

SCHEDULE = make_schedule(num_train_timesteps=100)
IMAGE = (2, 3, 5)  # 30 values: not a multiple of the noise's quads


def program(sampler="ddim", steps=10, **options):
    return build_program(
        sampler,
        schedule=SCHEDULE,
        prediction_type="epsilon",
        num_inference_steps=steps,
        **options,
    )


def run_to_the_end(lanes: HostLanes) -> dict:
    images = {}
    while lanes.active:
        for finished in lanes.advance():
            images[finished.tag] = finished
    return images


def random_program(registers: int, rows: int, seed: int, *, learned: bool = False):
    """Any table at all: checks are skipped, because only the arithmetic is wanted."""
    rng = np.random.default_rng(seed)
    made = object.__new__(SamplerProgram)
    columns = {
        "sampler": "random",
        "timesteps": np.linspace(99, 0, rows),
        "input_scale": rng.uniform(0.5, 1.5, rows),
        "x0_from_x": rng.normal(size=rows),
        "x0_from_m": rng.normal(size=rows),
        "clip": np.where(rng.random(rows) < 0.5, 1.0, np.inf),
        "weights": rng.normal(size=(rows, registers, registers + 3)) / registers,
        "signal": np.ones(rows + 1),
        "noise": np.ones(rows + 1),
        "initial_scale": 1.5,
        "log_sigma_min": rng.normal(size=rows) - 2 if learned else None,
        "log_sigma_max": rng.normal(size=rows) if learned else None,
        "evaluates": rng.random(rows) < 0.8,
        "guided": None,
        "shallow": None,
        "keeps_variance": False,
    }
    assert set(columns) == {field.name for field in dataclasses.fields(SamplerProgram)}
    for name, value in columns.items():
        object.__setattr__(made, name, value)
    made.weights[~made.evaluates, :, -3:-1] = 0.0
    return made


def rows_in_float64(made, network, *, seed, index, shape, channels_out):
    """The definition in program.py's docstring, one lane, written out in float64."""
    size = int(np.prod(shape))
    registers = [np.zeros(shape) for _ in range(made.weights.shape[1])]
    registers[0] = made.initial_scale * noise(seed, index, 0, size).reshape(shape).astype(float)
    for row in range(len(made.timesteps)):
        m = v = np.zeros(shape)
        if made.evaluates[row]:
            answer = network(
                (made.input_scale[row] * registers[0])[None].astype(np.float32),
                np.float32([made.timesteps[row]]),
                np.int64([0]),
            )[0]
            m, v = answer[: shape[0]], answer[shape[0] :] if channels_out > shape[0] else None
        x0 = made.x0_from_x[row] * registers[0] + made.x0_from_m[row] * m
        x0 = np.clip(x0, -made.clip[row], made.clip[row])
        z = noise(seed, index, row + 1, size).reshape(shape).astype(float)
        new = []
        for i in range(len(registers)):
            W = made.weights[row, i]
            total = sum(W[j] * registers[j] for j in range(len(registers)))
            total = total + W[-3] * m + W[-2] * x0
            z_weight = W[-1]
            if i == 0 and made.log_sigma_min is not None:
                low, high = made.log_sigma_min[row], made.log_sigma_max[row]
                z_weight = W[-1] * np.exp(low + (v + 1) / 2 * (high - low))
            new.append(total + z_weight * z)
        registers = new
    return registers[0]


def smooth_network(sample, timestep, label):
    return np.tanh(sample + 0.01 * timestep[:, None, None, None])


@pytest.mark.parametrize("registers", [1, 2, 3, 4])
@pytest.mark.parametrize("learned", [False, True])
def test_lanes_do_what_a_row_is_defined_to_do(registers, learned):
    channels_out = IMAGE[0] * (2 if learned else 1)

    def network(sample, timestep, label):
        answer = smooth_network(sample, timestep, label)
        return np.concatenate([answer, -answer[:, ::-1]], axis=1) if learned else answer

    backend = FunctionBackend(network, IMAGE, prediction_channels=channels_out)
    made = random_program(registers, rows=6, seed=registers, learned=learned)
    made.evaluates[:] = True if learned else made.evaluates
    lanes = HostLanes(backend, 3)
    for index in range(3):
        lanes.start(made, seed=4, index=index, tag=index)
    images = run_to_the_end(lanes)
    for index in range(3):
        expected = rows_in_float64(
            made, network, seed=4, index=index, shape=IMAGE, channels_out=channels_out
        )
        # six rows of float32 sums of about eight terms of order one
        assert np.abs(images[index].image - expected).max() < 1e-4 * np.abs(expected).max() + 1e-5


def conditional_backend():
    base = gaussian_epsilon(SCHEDULE)

    def network(sample, timestep, label):
        return base(sample, timestep, label) + 0.1 * label[:, None, None, None].astype(np.float32)

    return FunctionBackend(network, IMAGE, num_classes=4)


def requests():
    """Twenty images of different samplers, lengths, classes and guidance."""
    kinds = [
        program("ddim", 7),
        program("ddpm", 20),
        program("ddim", 13, eta=0.7),
        random_program(3, rows=5, seed=1),
        program("ddpm", 9, variance="fixed_large"),
    ]
    return [
        {
            "program": kinds[i % 5],
            "seed": i // 7,
            "index": i,
            "label": None if i % 3 == 0 else i % 4,
            "guidance_scale": 1.0 if i % 2 else 2.5,
            "tag": i,
        }
        for i in range(20)
    ]


@pytest.fixture(scope="module")
def images_alone():
    alone = {}
    for request in requests():
        lanes = HostLanes(conditional_backend(), 1)
        lanes.start(**request)
        alone |= run_to_the_end(lanes)
    return alone


@pytest.mark.parametrize("trial", range(10))
def test_an_image_does_not_depend_on_capacity_order_or_company(images_alone, trial):
    rng = np.random.default_rng(trial)
    capacity = int(rng.integers(1, 33))
    queue = [requests()[i] for i in rng.permutation(20)]
    lanes = HostLanes(conditional_backend(), capacity)
    images = {}
    while queue or lanes.active:
        # arrivals at random moments: continuous batching
        while queue and lanes.free and (rng.random() < 0.4 or not lanes.active):
            lanes.start(**queue.pop())
        for finished in lanes.advance():
            images[finished.tag] = finished
    assert set(images) == set(images_alone)
    for tag, alone in images_alone.items():
        assert (images[tag].image.view(np.uint32) == alone.image.view(np.uint32)).all()


def test_x_T_is_draw_zero_and_a_one_row_program_is_plain_arithmetic():
    lanes = HostLanes(FunctionBackend(lambda x, t, y: 0 * x, IMAGE), 1)
    lanes.start(program(steps=1), seed=3, index=8)
    x_T = noise(3, 8, 0, 30).reshape(IMAGE)
    assert (next(iter(lanes.images().values())) == x_T).all()


def test_guidance_of_one_evaluates_the_network_once_a_lane():
    rows = []

    def counting(sample, timestep, label):
        rows.append(len(sample))
        return 0 * sample

    backend = FunctionBackend(counting, IMAGE, num_classes=2)
    for scale, expected in ((1.0, 3), (3.0, 6)):
        rows.clear()
        lanes = HostLanes(backend, 3)
        for index in range(3):
            lanes.start(program(), seed=0, index=index, label=1, guidance_scale=scale, tag=index)
        run_to_the_end(lanes)
        assert set(rows) == {expected}


def test_guidance_is_uncond_plus_scale_times_the_difference():
    # cond says 1, uncond says 0.25; a network this simple makes x after one row linear in m
    def network(sample, timestep, label):
        return np.where(label == 2, 0.25, 1.0)[:, None, None, None] * np.ones_like(sample)

    def image(label, scale):
        lanes = HostLanes(FunctionBackend(network, IMAGE, num_classes=2), 1)
        lanes.start(
            program(steps=1, clip=np.inf), seed=0, index=0, label=label, guidance_scale=scale
        )
        return run_to_the_end(lanes)[None].image.astype(np.float64)

    unconditional, conditional = image(None, 1.0), image(0, 1.0)
    for scale in (0.0, 0.5, 2.0, 7.5):
        expected = unconditional + scale * (conditional - unconditional)
        assert np.abs(image(0, scale) - expected).max() < 1e-4 * np.abs(expected).max()


def test_nan_in_one_lane_fails_that_lane_and_names_its_row():
    clean = gaussian_epsilon(SCHEDULE)

    def poisoned(sample, timestep, label):
        answer = clean(sample, timestep, label)
        answer[(label == 1) & (timestep < 50)] = np.nan
        return answer

    def images(network, labels):
        lanes = HostLanes(FunctionBackend(network, IMAGE, num_classes=2), 4)
        for index, label in enumerate(labels):
            lanes.start(program(steps=10), seed=0, index=index, label=label, tag=index)
        return run_to_the_end(lanes)

    spoilt = images(poisoned, [0, 1, 0, 0])
    expected = images(clean, [0, 1, 0, 0])
    # ten steps of 100: timesteps 90, 80, …; the sixth row (row 5) is the first below 50
    assert spoilt[1].failed_row == 5
    for index in (0, 2, 3):
        assert spoilt[index].failed_row is None
        assert (spoilt[index].image == expected[index].image).all()


def test_a_failing_network_leaves_every_lane_as_it_was():
    fail = [False]

    def network(sample, timestep, label):
        if fail[0]:
            raise RuntimeError("network failed")
        return 0.1 * sample

    lanes = HostLanes(FunctionBackend(network, IMAGE), 2)
    lanes.start(program(), seed=0, index=0, tag="a")
    lanes.advance()
    before = lanes.images()["a"]
    fail[0] = True
    with pytest.raises(RuntimeError):
        lanes.advance()
    assert (lanes.images()["a"] == before).all()
    fail[0] = False
    undisturbed = HostLanes(FunctionBackend(network, IMAGE), 1)
    undisturbed.start(program(), seed=0, index=0, tag="a")
    expected = run_to_the_end(undisturbed)["a"].image
    assert (run_to_the_end(lanes)["a"].image == expected).all()


def test_cancelled_lanes_are_free_at_once_and_others_go_on_unchanged():
    backend = FunctionBackend(gaussian_epsilon(SCHEDULE), IMAGE)
    lanes = HostLanes(backend, 4)
    for index in range(4):
        lanes.start(program(), seed=0, index=index, tag=index)
    lanes.advance()
    assert lanes.cancel(lambda tag: tag in (0, 2)) == 2
    assert lanes.free == 2
    kept = run_to_the_end(lanes)
    assert set(kept) == {1, 3}
    alone = HostLanes(backend, 1)
    alone.start(program(), seed=0, index=3, tag=3)
    assert (kept[3].image == run_to_the_end(alone)[3].image).all()


def test_starting_more_lanes_than_there_are_is_refused():
    lanes = HostLanes(FunctionBackend(lambda x, t, y: x, IMAGE), 1)
    lanes.start(program(), seed=0, index=0)
    with pytest.raises(LifecycleError, match="advance"):
        lanes.start(program(), seed=0, index=1)


def test_a_learned_variance_program_needs_a_network_of_twice_the_channels():
    lanes = HostLanes(FunctionBackend(lambda x, t, y: x, IMAGE), 1)
    with pytest.raises(ConfigurationError, match="4 channels"):
        lanes.start(random_program(1, rows=2, seed=0, learned=True), seed=0, index=0)


def test_a_fixed_variance_program_ignores_the_variance_a_network_learned():
    def network(sample, timestep, label):
        return smooth_network(sample, timestep, label)

    def with_variance(sample, timestep, label):
        return np.concatenate([network(sample, timestep, label), 5 + 0 * sample], axis=1)

    images = []
    for function, channels in ((network, 2), (with_variance, 4)):
        lanes = HostLanes(FunctionBackend(function, IMAGE, prediction_channels=channels), 1)
        lanes.start(program("ddpm"), seed=0, index=0)
        images.append(run_to_the_end(lanes)[None].image)
    assert (images[0] == images[1]).all()


def test_capacity_below_one_is_refused():
    with pytest.raises(ConfigurationError, match="batch size"):
        HostLanes(FunctionBackend(lambda x, t, y: x, IMAGE), 0)


def test_an_infinite_answer_disturbs_a_lane_no_more_in_company_than_alone():
    """x0 of an infinite epsilon is clipped, so a program that uses x0 alone goes on."""

    def network(x, t, label):
        return np.where(x[:, :1, :1, :1] > 0, np.float32(np.inf), 0 * x)

    programs = [program("dpmpp_2m", 4, clip=1.0), random_program(1, 4, 0)]  # one that uses epsilon
    start = np.full(IMAGE, 0.5, np.float32)
    alone = HostLanes(FunctionBackend(network, IMAGE), 1)
    alone.start(programs[0], seed=0, index=0, initial=start)
    (expected,) = alone.advance(4)
    assert expected.failed_row is None
    company = HostLanes(FunctionBackend(network, IMAGE), 2)
    company.start(programs[0], seed=0, index=0, initial=start, tag="same")
    company.start(programs[1], seed=0, index=1, tag="other")
    found = {lane.tag: lane for lane in company.advance(4)}
    assert found["same"].image.tobytes() == expected.image.tobytes()


def test_several_rows_at_once_are_the_same_rows():
    lanes = [HostLanes(FunctionBackend(lambda x, t, y: 0.1 * x, IMAGE), 3) for _ in range(2)]
    for one in lanes:
        for index in range(3):
            one.start(program("ddim", 5 + index), seed=0, index=index, tag=index)
    slow = [lane for _ in range(7) for lane in lanes[0].advance()]
    quick = lanes[1].advance(9)
    assert [lane.tag for lane in slow] == [lane.tag for lane in quick] == [0, 1, 2]
    assert all((a.image == b.image).all() for a, b in zip(slow, quick, strict=True))
    assert lanes[0].rows_done == lanes[1].rows_done == 5 + 6 + 7
    with pytest.raises(ConfigurationError, match="rows must be ≥ 1"):
        lanes[0].advance(0)


def test_guidance_of_an_unconditional_network_is_refused():
    lanes = HostLanes(FunctionBackend(lambda x, t, y: x, IMAGE), 1)
    with pytest.raises(ConfigurationError, match="unconditional"):
        lanes.start(program("ddim", 3), seed=0, index=0, guidance_scale=2.0)
