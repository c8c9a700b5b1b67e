"""runtime/ddpm_runtime/plans/spec.py"""

from __future__ import annotations

import dataclasses

import pytest
from plan_worlds import GPU, FakeDevice, key_for

from ddpm_runtime.errors import ConfigurationError
from ddpm_runtime.plans import Gpu, PlanKey, PlanSpec, buckets_for


@pytest.mark.parametrize(
    ("capacity", "buckets"),
    [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (8, (1, 2, 4, 8)), (12, (1, 2, 4, 8, 12))],
)
def test_buckets_are_powers_of_two_and_the_capacity(capacity, buckets):
    assert buckets_for(capacity) == buckets


def test_every_number_of_rows_has_a_bucket_less_than_twice_as_large():
    for capacity in range(1, 130):
        buckets = buckets_for(capacity)
        for rows in range(1, capacity + 1):
            assert min(b for b in buckets if b >= rows) < 2 * rows


@pytest.mark.parametrize(
    "wrong",
    [
        {"buckets": ()},
        {"buckets": (2, 1)},
        {"buckets": (0, 1)},
        {"buckets": (1, 1)},
        {"buckets": (1,), "optimization_level": 6},
        {"buckets": (1,), "sms": (89, 86)},
    ],
)
def test_an_impossible_specification_is_refused(wrong):
    with pytest.raises(ConfigurationError, match="got"):
        PlanSpec(**wrong)


def test_capacity_zero_is_refused():
    with pytest.raises(ConfigurationError, match="got 0"):
        buckets_for(0)


def test_every_part_of_a_key_changes_its_identity_and_is_named_in_the_differences():
    key = key_for()
    identities = {key.identity}
    for field in dataclasses.fields(PlanKey):
        other = dataclasses.replace(key, **{field.name: "something else"})
        identities.add(other.identity)
        (difference,) = other.differences(key)
        assert "something else" in difference or "something"[:8] in difference
        assert "→" in difference
    assert len(identities) == 1 + len(dataclasses.fields(PlanKey))
    assert key.differences(key) == []


def test_a_plan_by_compute_capability_fits_any_gpu_that_has_it_and_no_other():
    key = key_for(library="tensorrt_rtx", version="1.7", sms=(86, 89))
    here = {"library": "tensorrt_rtx", "version": "1.7"}
    assert key.misfits(**here, gpu=Gpu(name="one", sm=86, cuda="12.9")) == []
    assert key.misfits(**here, gpu=Gpu(name="another", sm=89, cuda="13.1")) == []
    (misfit,) = key.misfits(**here, gpu=Gpu(name="one", sm=90, cuda="13.0"))
    assert "9.0 here" in misfit
    assert "8.6,8.9 in the plan" in misfit


def test_a_plan_for_a_gpu_is_tied_to_it():
    key = key_for()
    here = {"library": "tensorrt", "version": "10.13"}
    assert key.misfits(**here, gpu=GPU) == []
    for change, words in [
        ({"name": "NVIDIA Other"}, "NVIDIA Other here, NVIDIA Test in the plan"),
        ({"cuda": "12.4"}, "12.4 here, 13.0 in the plan"),
        ({"sm": 120}, "12.0 here, 8.9 in the plan"),
    ]:
        (misfit,) = key.misfits(**here, gpu=dataclasses.replace(GPU, **change))
        assert words in misfit


def test_without_a_gpu_a_compute_capability_is_asked_for():
    with pytest.raises(ConfigurationError, match="--sm"):
        PlanKey.of(b"", PlanSpec(buckets=(1,)), library="tensorrt", version="11", gpu=None)


def test_the_gpu_is_read_from_an_open_device():
    assert Gpu.of(FakeDevice([], Gpu(name="H", sm=90, cuda="13.0"))) == Gpu(
        name="H", sm=90, cuda="13.0"
    )
