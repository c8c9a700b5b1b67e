"""Step caching: which rows are shallow, whose features they get, and who is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ddpm_runtime import Engine
from ddpm_runtime.backends import FunctionBackend
from ddpm_runtime.errors import ConfigurationError
from ddpm_runtime.lanes import HostLanes
from ddpm_runtime.program import SamplerProgram
from ddpm_runtime.samplers import build_program
from ddpm_runtime.schedule import make_schedule
from ddpm_runtime.step_cache import with_step_cache

SCHEDULE = make_schedule(num_train_timesteps=100)
IMAGE, DEEP, CLASSES = (2, 3, 5), (3, 1, 2), 4


def program(sampler="ddim", steps=10, *, interval=1, **options) -> SamplerProgram:
    made = build_program(
        sampler,
        schedule=SCHEDULE,
        prediction_type="epsilon",
        num_inference_steps=steps,
        **options,
    )
    return with_step_cache(made, interval)


def deep_features(x, t, label):
    means = x.mean(axis=(1, 2, 3)) + np.float32(0.01) * t + np.float32(0.1) * label
    return np.sin(means[:, None, None, None] + np.arange(6, dtype=np.float32).reshape(DEEP))


def shallow(x, t, label, deep):
    """The outer layers: what x says now, and what the deep features said."""
    told = deep.sum(axis=(1, 2, 3), dtype=np.float32)[:, None, None, None]
    return np.float32(0.5) * x + np.float32(0.1) * told * np.cos(x)


def whole(x, t, label):
    deep = deep_features(x, t, label)
    return shallow(x, t, label, deep), deep


def backend(log=None):
    def noted(kind, function):
        def call(x, *rest):
            if log is not None:
                log.append((kind, len(x)))
            return function(x, *rest)

        return call

    return FunctionBackend(
        noted("plain", lambda x, t, label: whole(x, t, label)[0]),
        IMAGE,
        num_classes=CLASSES,
        cached=(noted("whole", whole), noted("shallow", shallow)),
        deep_shape=DEEP,
    )


def draw(requests, capacity=8, log=None):
    """Final images of requests (keyword arguments of start), by tag."""
    lanes, done = HostLanes(backend(log), capacity), {}
    waiting = list(requests)
    while waiting or lanes.active:
        while waiting and lanes.free:
            lanes.start(**waiting.pop(0))
        done.update({lane.tag: lane.image for lane in lanes.advance()})
    return done


@pytest.mark.parametrize(
    ("interval", "pattern"), [(2, "wswswswsws"), (3, "wsswsswssw"), (99, "wsssssssss")]
)
def test_every_so_many_evaluations_are_whole(interval, pattern):
    shallow_rows = program(interval=interval).table.shallow
    assert "".join("s" if row else "w" for row in shallow_rows) == pattern


def test_rows_without_an_evaluation_do_not_count():
    made = program("repaint", 20, interval=2, jump_length=2, jump_count=2)
    asked = made.table.shallow[made.table.evaluates]
    assert (asked == (np.arange(len(asked)) % 2 == 1)).all()
    assert not made.table.shallow[~made.table.evaluates].any()


def test_the_first_guided_row_is_whole_because_its_second_half_has_kept_nothing():
    made = program(interval=4, guidance_interval=(20, 60))
    table = made.table
    assert table.guided.any()
    assert not table.guided.all()
    first = int(np.flatnonzero(table.guided)[0])
    assert first % 4 != 0  # it would be shallow by the count
    assert not table.shallow[first]
    kept = False
    for row in range(len(made)):
        kept = bool(table.guided[row]) if not table.shallow[row] else kept
        assert kept or not table.guided[row]


def test_a_shallow_row_has_the_features_of_the_last_whole_one():
    made = program(interval=3)
    (image,) = draw([{"program": made, "seed": 1, "index": 2, "label": 1}]).values()

    kept = {}

    def network(x, t, label):
        row = kept["row"] = kept.get("row", -1) + 1
        if not made.table.shallow[row]:
            kept["deep"] = deep_features(x, t, label)
        return shallow(x, t, label, kept["deep"])

    plain = HostLanes(FunctionBackend(network, IMAGE, num_classes=CLASSES), 1)
    plain.start(program(), seed=1, index=2, label=1)
    (expected,) = plain.advance(10)
    assert image.tobytes() == expected.image.tobytes()


def test_caching_costs_as_many_whole_evaluations_as_it_says():
    log = []
    requests = [
        {"program": program(interval=2), "seed": 0, "index": i, "label": i, "tag": i}
        | ({"guidance_scale": 2.0} if i else {})
        for i in range(2)
    ]
    draw(requests, log=log)
    assert log == [("whole", 3), ("shallow", 3)] * 5


@pytest.mark.parametrize("trial", range(6))
def test_an_image_does_not_depend_on_company_although_features_are_kept(trial):
    rng = np.random.default_rng(trial)
    programs = [
        *(program(steps=steps, interval=interval) for steps in (4, 9) for interval in (1, 2, 3)),
        program("heun", 5, interval=2),
        program("ddpm", 7, interval=3, guidance_interval=(10, 70)),
        program("repaint", 8, interval=2, jump_length=2, jump_count=2),
    ]
    requests = [
        {
            "program": programs[rng.integers(len(programs))],
            "seed": 5,
            "index": i,
            "label": int(rng.integers(CLASSES + 1)),
            "guidance_scale": float(rng.choice([1.0, 2.5])),
            "tag": i,
        }
        for i in range(25)
    ]
    together = draw(requests, capacity=int(rng.integers(2, 9)))
    for request in requests:
        alone = draw([request], capacity=1)
        assert alone[request["tag"]].tobytes() == together[request["tag"]].tobytes()


def test_an_interval_of_one_changes_nothing():
    made = program()
    assert with_step_cache(made, 1) is made


def test_tables_that_want_what_was_never_kept_are_refused():
    made = program(interval=2)
    with pytest.raises(ConfigurationError, match="before any were kept"):
        dataclasses.replace(made, shallow=~made.shallow)


def test_who_cannot_cache_says_how_to(tiny_engine_path):
    with pytest.raises(ConfigurationError, match="must be ≥ 1"):
        program(interval=0)
    lanes = HostLanes(FunctionBackend(lambda x, t, y: x, IMAGE), 1)
    with pytest.raises(ConfigurationError, match="--step-cache"):
        lanes.start(program(interval=2), seed=0, index=0)
    assert not lanes.active
    with Engine.load(tiny_engine_path) as engine:
        with pytest.raises(
            ConfigurationError, match=r"'tiny', which has no step caching.*--step-cache"
        ):
            engine.sample(1, cache_interval=2)
        with pytest.raises(ConfigurationError, match="must be ≥ 1"):
            engine.sample(1, cache_interval=0)
        assert (engine.sample(1, cache_interval=1) == engine.sample(1)).all()
