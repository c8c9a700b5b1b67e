"""runtime/ddpm_runtime/plans/build.py, library.py, progress.py, against every binding version."""

from __future__ import annotations

import io
import sys

import pytest
from fake_tensorrt import SMALL, VERSIONS, FakeTensorRT

from ddpm_runtime.errors import BackendUnavailableError, ConfigurationError
from ddpm_runtime.plans import (
    PlanBuildError,
    PlanSpec,
    ProgressLine,
    library_of,
    load_library,
    plan_from_onnx,
)


def build(fake, **spec):
    if fake.__name__ == "tensorrt_rtx":
        spec.setdefault("sms", (89,))
    return plan_from_onnx(library_of(fake), b"onnx", PlanSpec(**{"buckets": (1, 2, 4), **spec}))


@pytest.mark.parametrize("version", VERSIONS)
def test_every_call_exists_in_this_version(version):
    fake = FakeTensorRT(version)  # refuses what the version does not have
    built = build(fake, optimization_level=3, workspace_bytes=1 << 30)
    assert built.payload == b"a plan"
    assert built.layers == 17
    assert built.timing_cache == (b"" if version == "rtx" else b"timings")


@pytest.mark.parametrize("version", VERSIONS)
def test_networks_are_strongly_typed(version):
    fake = FakeTensorRT(version)
    build(fake)
    ((_, flags),) = [call for call in fake.calls if call[0] == "Builder.create_network"]
    asked = version.startswith("10")  # always on in 11 and RTX
    assert flags == (1 << fake.NetworkDefinitionCreationFlag.STRONGLY_TYPED if asked else 0)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_plan_uses_one_stream_no_tf32_and_a_profile_for_exactly_each_batch_size(version):
    fake = FakeTensorRT(version)
    build(fake)
    assert ("IBuilderConfig.max_aux_streams =", 0) in fake.calls
    assert ("IBuilderConfig.clear_flag", fake.BuilderFlag.TF32) in fake.calls
    shapes = [call[1:] for call in fake.calls if call[0] == "IOptimizationProfile.set_shape"]
    expected = [
        (name, *((bucket, *shape[1:]),) * 3)
        for bucket in (1, 2, 4)
        for name, shape in SMALL.items()
        if name != "prediction"
    ]
    assert shapes == expected
    assert fake.names().count("IBuilderConfig.add_optimization_profile") == 3


def test_tf32_is_left_on_when_asked_for():
    fake = FakeTensorRT("11.4")
    build(fake, tf32=True)
    assert "IBuilderConfig.clear_flag" not in fake.names()


@pytest.mark.parametrize(("buckets", "asked"), [((8,), True), ((4, 8), False)])
def test_lane_independence_is_asked_for_where_the_library_grants_it(buckets, asked):
    fake = FakeTensorRT("10.16")
    build(fake, buckets=buckets)
    flag = fake.BuilderFlag.DISTRIBUTIVE_INDEPENDENCE
    assert (("IBuilderConfig.set_flag", flag) in fake.calls) is asked


def test_rtx_allocates_nothing_while_running_and_targets_what_it_is_told():
    fake = FakeTensorRT("rtx")
    build(fake, sms=(80, 120))
    assert ("IBuilderConfig.set_flag", fake.BuilderFlag.REQUIRE_USER_ALLOCATION) in fake.calls
    assert ("IBuilderConfig.num_compute_capabilities =", 2) in fake.calls
    targets = [call[1:] for call in fake.calls if call[0].endswith("set_compute_capability")]
    assert targets == [(fake.ComputeCapability.SM80, 0), (fake.ComputeCapability.SM120, 1)]
    assert "IBuilderConfig.set_timing_cache" not in fake.names()


def test_rtx_for_hopper_is_refused_with_what_is_possible():
    fake = FakeTensorRT("rtx")
    with pytest.raises(ConfigurationError, match=r"cannot build for compute capability 9\.0") as e:
        build(fake, sms=(90,))
    assert "possible --sm: 75, 80, 86, 89, 120, 121" in str(e.value)
    assert "ddpm-engine[tensorrt]" in str(e.value)
    assert fake.calls == []


def test_rtx_without_a_target_and_bfloat16_for_turing_are_refused():
    fake = FakeTensorRT("rtx")
    with pytest.raises(ConfigurationError, match="name at least one"):
        build(fake, sms=())
    with pytest.raises(ConfigurationError, match="--precision fp16"):
        build(fake, sms=(75, 89), precision="bf16")


def test_full_tensorrt_cannot_build_for_another_gpu():
    with pytest.raises(ConfigurationError, match=r"leave --sm out .*ddpm-engine\[rtx\]"):
        build(FakeTensorRT("11.4"), sms=(89,))


def test_a_network_it_cannot_read_is_refused_with_its_words_and_the_node():
    with pytest.raises(PlanBuildError, match=r"unsupported \(node 'conv_in'\)"):
        build(FakeTensorRT("11.4", refuse=("OnnxParser.parse",)))


def test_a_build_that_fails_says_what_the_logger_was_told():
    fake = FakeTensorRT("10.13", refuse=("Builder.build_serialized_network",))
    fake.says = "no implementation for Conv"
    with pytest.raises(PlanBuildError, match="no implementation for Conv") as caught:
        build(fake)
    assert "--backend onnxruntime" in str(caught.value)


def test_a_batch_size_it_refuses_is_named():
    fake = FakeTensorRT("10.13", refuse=("IBuilderConfig.add_optimization_profile",))
    with pytest.raises(PlanBuildError, match="refuses batch size 1"):
        build(fake)


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (-1, 1, -1, 8)])
def test_a_network_with_another_dynamic_dimension_is_refused(shape):
    fake = FakeTensorRT("11.4", tensors={**SMALL, "sample": shape})
    with pytest.raises(PlanBuildError, match="'sample' has shape"):
        build(fake)


def test_timings_of_another_gpu_are_dropped_not_forced():
    fake = FakeTensorRT("11.4", refuse=("IBuilderConfig.set_timing_cache",))
    built = plan_from_onnx(
        library_of(fake), b"onnx", PlanSpec(buckets=(1,)), timing_cache=b"from elsewhere"
    )
    assert built.payload == b"a plan"
    created = [call[1] for call in fake.calls if call[0].endswith("create_timing_cache")]
    assert created == [b"from elsewhere", b""]
    forced = [call[2] for call in fake.calls if call[0].endswith("set_timing_cache")]
    assert forced == [False, False]


def test_one_module_has_one_logger_for_ever():
    fake = FakeTensorRT("11.4")
    assert library_of(fake) is library_of(fake)
    build(fake)
    build(fake)
    loggers = {id(call[1]) for call in fake.calls if call[0] == "Builder"}
    assert len(loggers) == 1


def test_a_library_that_is_not_installed_names_its_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'ddpm-engine\[tensorrt\]'"):
        load_library("tensorrt")


def test_an_unknown_library_is_refused():
    with pytest.raises(ConfigurationError, match="tensorrt_rtx"):
        load_library("tensorrt_rt")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_one_line_that_wipes_itself():
    out, now = Terminal(), iter(range(100))
    line = ProgressLine(out, clock=lambda: next(now))
    line.start("Building engine", 6)
    line.start("Timing", 10)
    line.step("Timing", 4)
    line.step("unknown phase", 1)
    line.finish("Timing")
    line.finish("Building engine")
    written = out.getvalue()
    assert "Building engine 0/6 › Timing 5/10" in written
    assert "\n" not in written
    assert written.endswith("\r\x1b[K")
    assert all(len(part) <= 120 for part in written.split("\r"))


def test_progress_is_silent_where_there_is_no_terminal():
    out = io.StringIO()
    line = ProgressLine(out)
    line.start("Building engine", 6)
    line.finish("Building engine")
    assert out.getvalue() == ""
