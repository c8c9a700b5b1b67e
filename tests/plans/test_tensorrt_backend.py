"""runtime/ddpm_runtime/backends/tensorrt.py against every binding version, call by call."""

from __future__ import annotations

import dataclasses

import pytest
from fake_tensorrt import SMALL, VERSIONS, FakeTensorRT
from plan_worlds import FakeDevice, key_for, small_bundle

from ddpm_runtime.backends.tensorrt import open_tensorrt
from ddpm_runtime.cuda.base import DeviceBuffers
from ddpm_runtime.errors import (
    BackendError,
    ConfigurationError,
    LifecycleError,
    NetworkMismatchError,
    OutOfDeviceMemoryError,
)
from ddpm_runtime.plans import PlanCache, PlanError, library_of
from ddpm_runtime.plans.sealed import write_sealed

STREAM = 0xABC
BUFFERS = DeviceBuffers(rows=4, sample=0x100, timestep=0x200, label=0x300, prediction=0x400)
BUNDLE = small_bundle()


@pytest.fixture
def cache(tmp_path):
    return PlanCache(tmp_path / "plans")


def opened(fake, cache, bundle=BUNDLE, **options):
    device = FakeDevice(fake.calls)
    return open_tensorrt(bundle, device, library=library_of(fake), cache=cache, **options), device


def bound(fake, cache, **options):
    backend, device = opened(fake, cache, **options)
    return backend.bind(BUFFERS), device


@pytest.mark.parametrize("version", VERSIONS)
def test_the_whole_life_uses_only_what_this_version_has(version, cache):
    fake = FakeTensorRT(version)
    backend, device = opened(fake, cache)
    binding = backend.bind(BUFFERS)
    for rows in (4, 1, 3):
        binding.prepare(STREAM, rows)
    fake.runs.clear()
    for rows in (4, 1, 3, 2, 4):
        if rows == 2:
            binding.prepare(STREAM, rows)
            fake.runs.clear()
        binding.enqueue(STREAM, rows)
    assert fake.runs == [(1, STREAM), (2, STREAM)]
    assert binding.capture_safe
    binding.close()
    binding.close()
    backend.close()
    backend.close()
    assert not device.open_memory


@pytest.mark.parametrize("version", VERSIONS)
def test_prepare_gives_a_context_its_memory_shapes_and_addresses_then_runs_it_once(version, cache):
    fake = FakeTensorRT(version)
    binding, _ = bound(fake, cache)
    fake.calls.clear()
    binding.prepare(STREAM, 2)
    calls = [
        call for call in fake.calls if call[0].startswith("IExecution") or call[0].startswith("cu")
    ]
    memory = calls[1]
    assert calls == [
        ("IExecutionContext.set_optimization_profile_async", 1, STREAM),
        ("IExecutionContext.set_device_memory", memory[1], 4000),
        ("IExecutionContext.set_input_shape", "sample", (2, 1, 8, 8)),
        ("IExecutionContext.set_tensor_address", "sample", 0x100),
        ("IExecutionContext.set_input_shape", "timestep", (2,)),
        ("IExecutionContext.set_tensor_address", "timestep", 0x200),
        ("IExecutionContext.set_input_shape", "label", (2,)),
        ("IExecutionContext.set_tensor_address", "label", 0x300),
        ("IExecutionContext.set_tensor_address", "prediction", 0x400),
        ("IExecutionContext.infer_shapes",),
        ("IExecutionContext.execute_async_v3", STREAM),
        ("cuStreamSynchronize", STREAM),
        *(
            [("IExecutionContext.is_stream_capturable", STREAM)] if version == "rtx" else []
        ),
    ]  # fmt: skip
    fake.calls.clear()
    binding.prepare(STREAM, 2)  # a second time, nothing
    assert fake.calls == []


@pytest.mark.parametrize("version", VERSIONS)
def test_enqueue_is_one_call_and_never_waits(version, cache):
    fake = FakeTensorRT(version)
    binding, _ = bound(fake, cache)
    binding.prepare(STREAM, 4)
    fake.calls.clear()
    binding.enqueue(STREAM, 3)
    assert fake.calls == [("IExecutionContext.execute_async_v3", STREAM)]


def test_all_contexts_share_one_workspace_as_large_as_the_largest_needs(cache):
    fake = FakeTensorRT("11.4")
    binding, _ = bound(fake, cache)
    for rows in (1, 2, 4):
        binding.prepare(STREAM, rows)
    assert [call for call in fake.calls if call[0] == "allocate"] == [("allocate", 4000)]
    given = {call[1:] for call in fake.calls if call[0].endswith("set_device_memory")}
    assert len(given) == 1


def test_memory_is_the_users_and_rtx_leaves_graphs_to_us(cache):
    fake = FakeTensorRT("rtx")
    binding, _ = bound(fake, cache)
    binding.prepare(STREAM, 1)
    user_managed = fake.ExecutionContextAllocationStrategy.USER_MANAGED
    eager = fake.DynamicShapesKernelSpecializationStrategy.EAGER
    for call in [
        ("IRuntimeConfig.set_execution_context_allocation_strategy", user_managed),
        ("IRuntimeConfig.cuda_graph_strategy =", fake.CudaGraphStrategy.DISABLED),
        ("IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy =", eager),
    ]:
        assert call in fake.calls
    full = FakeTensorRT("11.4")
    binding, _ = bound(full, cache)
    binding.prepare(STREAM, 1)
    user_managed = full.ExecutionContextAllocationStrategy.USER_MANAGED
    assert ("ICudaEngine.create_execution_context", user_managed) in full.calls


def test_what_rtx_compiled_is_kept_for_the_next_start(cache):
    fake = FakeTensorRT("rtx")
    binding, _ = bound(fake, cache)
    binding.prepare(STREAM, 1)
    (path,) = cache.directory.glob("*.kernels")
    written = path.stat().st_ino
    binding.prepare(STREAM, 2)  # nothing new was compiled
    assert path.stat().st_ino == written
    fake.kernels = type(fake.kernels)(b"compiled kernels and one more")
    binding.prepare(STREAM, 4)
    assert path.stat().st_ino != written
    assert "IRuntimeCache.deserialize" not in fake.names()
    again = FakeTensorRT("rtx")
    bound(again, cache)
    assert ("IRuntimeCache.deserialize", b"compiled kernels and one more") in again.calls


def test_a_context_that_rtx_says_cannot_be_captured_is_not_capture_safe(cache):
    fake = FakeTensorRT("rtx")
    fake.capturable = False
    binding, _ = bound(fake, cache)
    binding.prepare(STREAM, 1)
    assert not binding.capture_safe


def test_buffers_of_a_size_the_plan_has_share_its_engine_and_others_get_their_own(cache):
    fake = FakeTensorRT("11.4")
    backend, _ = opened(fake, cache)
    backend.bind(BUFFERS)
    small = backend.bind(dataclasses.replace(BUFFERS, rows=2))
    assert fake.names().count("Runtime.deserialize_cuda_engine") == 1
    assert [call for call in fake.calls if call[0] == "allocate"][-1] == ("allocate", 2000)
    small.prepare(STREAM, 2)
    with pytest.raises(BackendError, match="these buffers hold 1 to 2"):
        small.prepare(STREAM, 3)
    fake.buckets = (1, 2, 4, 6)
    backend.bind(dataclasses.replace(BUFFERS, rows=6))
    assert fake.names().count("Runtime.deserialize_cuda_engine") == 2


def test_batch_sizes_can_be_chosen(cache):
    fake = FakeTensorRT("11.4", buckets=(3, 4))
    binding, _ = bound(fake, cache, buckets=[4, 3])
    binding.prepare(STREAM, 1)
    assert fake.runs == [(0, STREAM)]


def test_an_unconditional_network_has_no_label(cache):
    tensors = {name: shape for name, shape in SMALL.items() if name != "label"}
    fake = FakeTensorRT("11.4", tensors=tensors)
    binding, _ = bound(fake, cache, bundle=small_bundle(num_classes=0))
    binding.prepare(STREAM, 1)
    assert not any("label" in call for call in fake.calls)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sample": (-1, 3, 8, 8)}, "sample"),
        ({"extra": (-1,)}, "extra"),
    ],
)
def test_a_plan_whose_tensors_are_not_the_manifests_is_refused(cache, change, words):
    fake = FakeTensorRT("11.4")
    backend, _ = opened(fake, cache)
    fake.tensors = {**SMALL, **change}
    with pytest.raises(NetworkMismatchError, match=words):
        backend.bind(BUFFERS)


def test_a_plan_whose_profiles_are_not_its_batch_sizes_is_refused(cache):
    fake = FakeTensorRT("11.4", buckets=(1, 2, 8))
    with pytest.raises(NetworkMismatchError, match="batch sizes"):
        bound(fake, cache)


def test_a_named_plan_has_the_batch_sizes_it_has(cache, tmp_path):
    fake = FakeTensorRT("11.4")
    key = key_for(BUNDLE.network_bytes, library="tensorrt", version=fake.__version__)
    path = tmp_path / "named.plan"
    write_sealed(path, b"a plan", kind="plan", label="tiny", key=key, secret=cache.secret)
    backend, _ = opened(fake, cache, plan=path)
    backend.bind(BUFFERS).prepare(STREAM, 4)
    assert "Builder" not in fake.names()
    assert ("Runtime.deserialize_cuda_engine", b"a plan") in fake.calls
    assert "this user's plan" in backend.description
    with pytest.raises(PlanError, match="the plan holds batch sizes 1, 2, 4; 6 rows"):
        backend.bind(dataclasses.replace(BUFFERS, rows=6))


@pytest.mark.parametrize(
    "refused",
    [
        "Runtime.deserialize_cuda_engine",
        "ICudaEngine.create_execution_context",
        "IExecutionContext.set_optimization_profile_async",
        "IExecutionContext.set_input_shape",
        "IExecutionContext.set_tensor_address",
        "IExecutionContext.infer_shapes",
        "IExecutionContext.execute_async_v3",
    ],
)
def test_every_refusal_of_the_library_is_an_error_with_its_words(cache, refused):
    fake = FakeTensorRT("11.4", refuse=(refused,))
    fake.says = "something is wrong inside"
    with pytest.raises(BackendError) as caught:
        bound(fake, cache)[0].prepare(STREAM, 1)
    words = "sample" if refused.endswith("infer_shapes") else "something is wrong inside"
    assert words in str(caught.value)
    assert "TensorRT 11.4" in str(caught.value)


def test_memory_that_runs_out_is_named_as_such(cache):
    fake = FakeTensorRT("11.4", refuse=("Runtime.deserialize_cuda_engine",))
    fake.says = "Error Code 2: OutOfMemory"
    with pytest.raises(OutOfDeviceMemoryError, match="smaller batch size"):
        bound(fake, cache)
    device = FakeDevice(fake.calls, memory=3999)
    backend = open_tensorrt(BUNDLE, device, library=library_of(FakeTensorRT("11.4")), cache=cache)
    with pytest.raises(OutOfDeviceMemoryError):
        backend.bind(BUFFERS)


def test_a_context_is_kept_only_once_it_has_run(cache):
    fake = FakeTensorRT("11.4", refuse=("IExecutionContext.execute_async_v3",))
    binding, _ = bound(fake, cache)
    with pytest.raises(BackendError):
        binding.prepare(STREAM, 1)
    with pytest.raises(LifecycleError, match="call prepare"):
        binding.enqueue(STREAM, 1)


def test_calls_in_the_wrong_order_name_the_missing_one(cache):
    fake = FakeTensorRT("11.4")
    backend, _ = opened(fake, cache)
    binding = backend.bind(BUFFERS)
    with pytest.raises(LifecycleError, match=r"call prepare\(stream, 2\) before enqueue"):
        binding.enqueue(STREAM, 2)
    with pytest.raises(ConfigurationError, match="not the default one"):
        binding.prepare(0, 2)
    binding.prepare(STREAM, 2)
    binding.close()
    for call in (binding.prepare, binding.enqueue):
        with pytest.raises(LifecycleError, match="closed"):
            call(STREAM, 2)
    backend.close()
    with pytest.raises(LifecycleError, match="closed"):
        backend.bind(BUFFERS)


@pytest.mark.parametrize("rows", [0, -1, 5])
def test_rows_that_the_buffers_do_not_hold_are_refused(cache, rows):
    binding, _ = bound(FakeTensorRT("11.4"), cache)
    with pytest.raises(BackendError, match="these buffers hold 1 to 4"):
        binding.prepare(STREAM, rows)


def test_the_description_says_what_runs_on_what(cache):
    fake = FakeTensorRT("rtx")
    backend, _ = opened(fake, cache)
    assert "no plan loaded yet" in backend.description
    backend.bind(BUFFERS)
    assert backend.description == (
        "TensorRT-RTX 1.7.1.116, NVIDIA Test, fp32 (plan: there is none for this network yet)"
    )
