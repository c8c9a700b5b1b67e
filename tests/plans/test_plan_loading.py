"""runtime/ddpm_runtime/plans/loading.py: a plan that lies never reaches the library (R21)."""

from __future__ import annotations

import dataclasses

import pytest
from fake_tensorrt import FakeTensorRT
from plan_worlds import GPU, FakeDevice, key_for, small_bundle

from ddpm_export.plan import default_plan_path, plan_from_bundle
from ddpm_runtime.backends.tensorrt import open_tensorrt
from ddpm_runtime.cuda.base import DeviceBuffers
from ddpm_runtime.plans import (
    DamagedPlanError,
    PlanCache,
    PlanMismatchError,
    PlanSpec,
    UntrustedPlanError,
    library_of,
    plan_from_cache,
    plan_from_file,
)
from ddpm_runtime.plans.sealed import write_sealed

BUNDLE = small_bundle()
STRANGER = bytes(32)
TOUCHES_A_PLAN = {"Runtime", "Runtime.deserialize_cuda_engine"}


@pytest.fixture
def fake():
    return FakeTensorRT("11.4", buckets=(1, 2, 4))


@pytest.fixture
def cache(tmp_path):
    return PlanCache(tmp_path / "plans")


def good_key(fake, **changes):
    key = key_for(BUNDLE.network_bytes, library=fake.__name__, version=fake.__version__)
    return dataclasses.replace(key, **changes)


def plan_file(tmp_path, cache, key, *, secret=None, payload=b"a plan", kind="plan"):
    path = tmp_path / "named.plan"
    write_sealed(
        path, payload, kind=kind, label="tiny", key=key, secret=secret or cache.secret
    )  # fmt: skip
    return path


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


LIES = {
    "another TensorRT version": ({"library_version": "10.13.3"}, PlanMismatchError, "11.4"),
    "the other library": ({"library": "tensorrt_rtx"}, PlanMismatchError, "tensorrt_rtx in the"),
    "another GPU": ({"gpu": "NVIDIA H200"}, PlanMismatchError, "NVIDIA H200 in the plan"),
    "another architecture": ({"compute_capability": "9.0"}, PlanMismatchError, "8.9 here, 9.0"),
    "another CUDA": ({"cuda": "12.4"}, PlanMismatchError, "13.0 here, 12.4 in the plan"),
    "another network": ({"network_sha256": "f" * 64}, PlanMismatchError, "in the bundle"),
}


def load(path, fake, cache, **options):
    return open_tensorrt(
        BUNDLE,
        FakeDevice(fake.calls),
        library=library_of(fake),
        plan=path,
        cache=cache,
        **options,
    )


@pytest.mark.parametrize("trust_plan", [False, True])
@pytest.mark.parametrize("lie", LIES)
def test_a_plan_for_something_else_is_refused_before_the_library_sees_it(
    fake, cache, tmp_path, lie, trust_plan
):
    changes, error, words = LIES[lie]
    path = plan_file(tmp_path, cache, good_key(fake, **changes))
    with pytest.raises(error, match=words) as caught:
        load(path, fake, cache, trust_plan=trust_plan)
    assert "Leave the plan out" in str(caught.value)
    assert not TOUCHES_A_PLAN & {*fake.names()}


@pytest.mark.parametrize("trust_plan", [False, True])
@pytest.mark.parametrize("damage", ["cut", "flipped", "header", "bare", "timings", "longer"])
def test_a_damaged_plan_is_refused_before_the_library_sees_it(
    fake, cache, tmp_path, damage, trust_plan
):
    key = good_key(fake)
    path = plan_file(tmp_path, cache, key, kind="timing" if damage == "timings" else "plan")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "longer":
        path.write_bytes(path.read_bytes() + b"x")
    elif damage == "flipped":
        flip(path, -1)
    elif damage == "header":
        flip(path, 40)
    elif damage == "bare":
        path.write_bytes(b"ftrt a plan as TensorRT writes it")
    with pytest.raises((DamagedPlanError, PlanMismatchError, UntrustedPlanError)):
        load(path, fake, cache, trust_plan=trust_plan)
    assert not TOUCHES_A_PLAN & {*fake.names()}


def test_a_strangers_plan_is_refused_before_the_library_sees_it(fake, cache, tmp_path):
    path = plan_file(tmp_path, cache, good_key(fake), secret=STRANGER)
    with pytest.raises(UntrustedPlanError, match="--trust-plan"):
        load(path, fake, cache)
    assert not TOUCHES_A_PLAN & {*fake.names()}


def test_a_strangers_plan_that_fits_is_taken_when_trusted(fake, cache, tmp_path):
    path = plan_file(tmp_path, cache, good_key(fake), secret=STRANGER)
    plan = plan_from_file(path, BUNDLE.network_bytes, library_of(fake), GPU, cache, trust_plan=True)
    assert plan.payload == b"a plan"
    assert "somebody else's, trusted on request" in plan.reason


def test_the_users_own_plan_needs_no_trust(fake, cache, tmp_path):
    path = plan_file(tmp_path, cache, good_key(fake))
    plan = plan_from_file(path, BUNDLE.network_bytes, library_of(fake), GPU, cache)
    assert plan.buckets == (1, 2, 4)
    assert "this user's" in plan.reason


def test_a_plan_ahead_of_time_is_taken_on_every_gpu_of_its_kind(cache, tmp_path):
    fake = FakeTensorRT("rtx")
    key = key_for(
        BUNDLE.network_bytes, library=fake.__name__, version=fake.__version__, sms=(86, 89)
    )
    path = plan_file(tmp_path, cache, key)
    for gpu in (GPU, dataclasses.replace(GPU, name="NVIDIA Other", sm=86, cuda="12.9")):
        assert plan_from_file(path, BUNDLE.network_bytes, library_of(fake), gpu, cache).payload
    hopper = dataclasses.replace(GPU, sm=90)
    with pytest.raises(PlanMismatchError, match=r"9\.0 here, 8\.6,8\.9 in the plan"):
        plan_from_file(path, BUNDLE.network_bytes, library_of(fake), hopper, cache)


def test_what_the_cache_holds_is_built_once_and_timings_are_kept(fake, cache):
    library, spec, said = library_of(fake), PlanSpec(buckets=(1, 2)), []

    def ask():
        return plan_from_cache(
            BUNDLE.network_bytes, spec, library, GPU, cache, label="tiny", notice=said.append
        )

    assert ask().payload == b"a plan"
    assert ask().reason == "found in the plan cache"
    assert fake.names().count("Builder.build_serialized_network") == 1
    assert ("IBuilderConfig.create_timing_cache", b"") in fake.calls
    assert said[-1].startswith("built in")
    spec = PlanSpec(buckets=(1, 2, 4))  # measured for the first, used for the second
    assert "the batch sizes: 1,2 → 1,2,4" in ask().reason
    assert ("IBuilderConfig.create_timing_cache", b"timings") in fake.calls


def test_rtx_builds_for_the_compute_capability_of_the_gpu(cache):
    fake = FakeTensorRT("rtx")
    plan = plan_from_cache(
        BUNDLE.network_bytes, PlanSpec(buckets=(1,)), library_of(fake), GPU, cache, label="tiny"
    )
    assert (plan.key.gpu, plan.key.compute_capability, plan.key.cuda) == ("any", "8.9", "any")
    sm89 = fake.ComputeCapability.SM89
    assert ("IBuilderConfig.set_compute_capability", sm89, 0) in fake.calls


def test_a_plan_that_was_exported_is_one_that_can_be_named(cache, tmp_path):
    fake, said = FakeTensorRT("rtx", buckets=(1, 2)), []
    path = plan_from_bundle(
        BUNDLE, tmp_path / "tiny.sm89.plan", library=library_of(fake), sms=[89], capacity=2,
        cache=cache, notice=said.append,
    )  # fmt: skip
    assert "building a plan for tiny: there is none for this network yet" in said
    backend = load(path, fake, cache)
    binding = backend.bind(DeviceBuffers(rows=2, sample=1, timestep=2, label=3, prediction=4))
    binding.prepare(5, 2)
    assert fake.runs == [(1, 5)]
    elsewhere = PlanCache(tmp_path / "somebody else's")
    with pytest.raises(UntrustedPlanError, match="--trust-plan"):
        load(path, fake, elsewhere)
    assert load(path, fake, elsewhere, trust_plan=True)


@pytest.mark.parametrize(
    ("engine", "sms", "name"),
    [
        ("a/fashion.engine", (), "a/fashion.plan"),
        ("fashion.engine", (89, 86), "fashion.sm86-sm89.plan"),
    ],
)
def test_where_an_exported_plan_goes(engine, sms, name):
    assert str(default_plan_path(engine, sms)) == name
