"""runtime/ddpm_runtime/backends/ort_cuda.py against a recording onnxruntime."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from plan_worlds import FakeDevice, small_bundle

from ddpm_runtime.backends import ort_cuda
from ddpm_runtime.backends.ort_cuda import open_ort_cuda
from ddpm_runtime.cuda.base import DeviceBuffers
from ddpm_runtime.errors import (
    BackendError,
    BackendUnavailableError,
    ConfigurationError,
    LifecycleError,
    NetworkMismatchError,
    OutOfDeviceMemoryError,
)

STREAM = 0xABC
BUFFERS = DeviceBuffers(rows=4, sample=0x100, timestep=0x200, label=0x300, prediction=0x400)
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


class FakeOnnxRuntime:
    """As much of the module as the backend uses; options are the real ones, so they must exist."""

    __version__ = "1.31.1"
    GraphOptimizationLevel = onnxruntime.GraphOptimizationLevel

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.available = [CUDA, CPU]
        self.loaded = [CUDA, CPU]  # what a session says it has
        self.fails: Exception | None = None
        self.run_fails: Exception | None = None
        self.shapes: dict[str, list[int]] = {}

    def get_available_providers(self):
        return self.available

    def set_default_logger_severity(self, level):
        pass

    def preload_dlls(self):
        print("looking for CUDA")  # as the real one does; it must not reach stdout
        self.calls.append(("preload_dlls",))

    def SessionOptions(self):
        real = onnxruntime.SessionOptions()
        calls = self.calls

        class Options:
            def __setattr__(self, name, value):
                assert hasattr(real, name)
                setattr(real, name, value)

            def add_session_config_entry(self, key, value):
                real.add_session_config_entry(key, value)
                calls.append(("config", key, value))

            def add_free_dimension_override_by_name(self, name, value):
                real.add_free_dimension_override_by_name(name, value)
                calls.append(("freeze", name, value))

        return Options()

    def RunOptions(self):
        real, calls = onnxruntime.RunOptions(), self.calls

        class Options:
            def add_run_config_entry(self, key, value):
                real.add_run_config_entry(key, value)
                calls.append(("run config", key, value))

        return Options()

    def InferenceSession(self, content, options, *, providers, enable_fallback):
        assert isinstance(content, bytes)
        assert enable_fallback == 0
        self.calls.append(("session", providers))
        if self.fails:
            raise self.fails
        rows = [call[2] for call in self.calls if call[0] == "freeze"][-1]
        real = onnxruntime.InferenceSession(content, providers=[CPU])

        def frozen(arguments):
            return [
                SimpleNamespace(
                    name=a.name,
                    type=a.type,
                    shape=self.shapes.get(a.name) or [rows, *a.shape[1:]],
                )
                for a in arguments
            ]

        return SimpleNamespace(
            disable_fallback=lambda: self.calls.append(("disable_fallback",)),
            get_providers=lambda: self.loaded,
            get_inputs=lambda: frozen(real.get_inputs()),
            get_outputs=lambda: frozen(real.get_outputs()),
            io_binding=lambda: SimpleNamespace(
                bind_input=lambda *a: self.calls.append(("input", *a)),
                bind_output=lambda *a: self.calls.append(("output", *a)),
            ),
            run_with_iobinding=self._run,
        )

    def _run(self, io_binding, options=None):
        if self.run_fails:
            raise self.run_fails
        self.calls.append(("run", "without waiting" if options else "waiting"))


@pytest.fixture
def fake(monkeypatch):
    module = FakeOnnxRuntime()
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    return module


def opened(fake, bundle=None, *, ordinal=0, **options):
    device = FakeDevice(fake.calls)
    device.ordinal = ordinal
    return open_ort_cuda(bundle or small_bundle(), device, **options)


def provider_options(fake):
    return next(call[1] for call in fake.calls if call[0] == "session")[0][1]


def test_a_session_has_a_frozen_batch_our_stream_and_cuda_alone(fake):
    binding = opened(fake).bind(BUFFERS)
    binding.prepare(STREAM, 3)
    assert ("config", "session.disable_cpu_ep_fallback", "1") in fake.calls
    assert ("freeze", "n", 3) in fake.calls
    ((name, options),) = next(call[1] for call in fake.calls if call[0] == "session")
    assert name == CUDA
    assert options["user_compute_stream"] == str(STREAM)
    assert options["enable_cuda_graph"] == "1"
    assert options["use_tf32"] == "0"
    assert options["device_id"] == "0"
    assert ("disable_fallback",) in fake.calls
    assert all(isinstance(value, str) for value in options.values())


def test_every_tensor_is_bound_by_its_device_address(fake):
    opened(fake, ordinal=1).bind(BUFFERS).prepare(STREAM, 3)
    assert [call for call in fake.calls if call[0] in ("input", "output")] == [
        ("input", "sample", "cuda", 1, np.float32, (3, 1, 8, 8), 0x100),
        ("input", "timestep", "cuda", 1, np.float32, (3,), 0x200),
        ("input", "label", "cuda", 1, np.int64, (3,), 0x300),
        ("output", "prediction", "cuda", 1, np.float32, (3, 1, 8, 8), 0x400),
    ]


def test_prepare_runs_until_the_graph_is_captured_and_waits_and_enqueue_does_not(fake):
    binding = opened(fake).bind(BUFFERS)
    binding.prepare(STREAM, 2)
    assert fake.calls[-4:] == [("run", "waiting")] * 3 + [("cuStreamSynchronize", STREAM)]
    assert ("run config", "disable_synchronize_execution_providers", "1") in fake.calls
    fake.calls.clear()
    binding.prepare(STREAM, 2)
    binding.enqueue(STREAM, 2)
    assert fake.calls == [("run", "without waiting")]


def test_each_number_of_rows_has_its_own_session_and_another_stream_another(fake):
    binding = opened(fake).bind(BUFFERS)
    for stream, rows in ((STREAM, 2), (STREAM, 4), (STREAM, 2), (STREAM + 1, 2)):
        binding.prepare(stream, rows)
    assert sum(call[0] == "session" for call in fake.calls) == 3
    with pytest.raises(LifecycleError, match="call prepare"):
        binding.enqueue(STREAM, 2)  # the graph now belongs to the other stream


def test_it_cannot_be_captured_in_a_callers_graph(fake):
    assert not opened(fake).bind(BUFFERS).capture_safe


def test_its_own_graph_and_tf32_are_options(fake):
    backend = opened(fake, own_graph=False, tf32=True, prefer_nhwc=False)
    backend.bind(BUFFERS).prepare(STREAM, 1)
    options = provider_options(fake)
    assert (options["enable_cuda_graph"], options["use_tf32"], options["prefer_nhwc"]) == (
        "0", "1", "0",
    )  # fmt: skip
    assert "graph" not in backend.description


@pytest.mark.parametrize(("precision", "nhwc"), [("fp32", "1"), ("fp16", "1"), ("bf16", "0")])
def test_convolutions_run_channels_last_where_there_are_such_kernels(fake, precision, nhwc):
    opened(fake, small_bundle(precision=precision)).bind(BUFFERS).prepare(STREAM, 1)
    assert provider_options(fake)["prefer_nhwc"] == nhwc


def test_a_cuda_provider_that_does_not_load_is_an_error_and_never_the_cpu(fake):
    fake.loaded = [CPU]
    with pytest.raises(BackendUnavailableError, match="could not load its CUDA provider") as caught:
        opened(fake).bind(BUFFERS).prepare(STREAM, 1)
    assert "nvidia-cudnn-cu13" in str(caught.value)
    assert not any(call[0] == "run" for call in fake.calls)


def test_a_build_without_cuda_names_the_pip_line(fake):
    fake.available = [CPU]
    with pytest.raises(BackendUnavailableError, match=r"pip uninstall -y onnxruntime .*\[gpu\]"):
        opened(fake)


def test_a_missing_library_names_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'ddpm-engine\[gpu\]'"):
        open_ort_cuda(small_bundle(), FakeDevice([]))


def test_what_the_library_prints_while_loading_does_not_reach_stdout(fake, capsys):
    opened(fake)
    out, err = capsys.readouterr()
    assert out == ""
    assert "looking for CUDA" in err


@pytest.mark.parametrize(
    ("precision", "remedy"), [("fp32", "--backend tensorrt"), ("bf16", "--precision fp16")]
)
def test_a_network_it_refuses_is_an_error_with_its_words(fake, precision, remedy):
    fake.fails = RuntimeError("nodes are assigned to the default CPU EP")
    backend = opened(fake, small_bundle(precision=precision))
    with pytest.raises(BackendError, match="assigned to the default CPU EP") as caught:
        backend.bind(BUFFERS).prepare(STREAM, 1)
    assert remedy in str(caught.value)


@pytest.mark.parametrize("when", ["fails", "run_fails"])
def test_memory_that_runs_out_is_named_as_such(fake, when):
    setattr(fake, when, RuntimeError("Failed to allocate memory for requested buffer of size 1"))
    with pytest.raises(OutOfDeviceMemoryError, match="smaller batch size"):
        opened(fake).bind(BUFFERS).prepare(STREAM, 1)


def test_a_run_that_fails_later_is_an_error(fake):
    binding = opened(fake).bind(BUFFERS)
    binding.prepare(STREAM, 1)
    fake.run_fails = RuntimeError("CUDNN_STATUS_EXECUTION_FAILED")
    with pytest.raises(BackendError, match="CUDNN_STATUS_EXECUTION_FAILED"):
        binding.enqueue(STREAM, 1)


def test_a_network_with_other_tensors_is_refused(fake):
    fake.shapes = {"prediction": [1, 3, 8, 8]}
    with pytest.raises(NetworkMismatchError, match="prediction"):
        opened(fake).bind(BUFFERS).prepare(STREAM, 1)


def test_calls_in_the_wrong_order_name_the_missing_one(fake):
    backend = opened(fake)
    binding = backend.bind(BUFFERS)
    with pytest.raises(LifecycleError, match=r"call prepare\(stream, 1\) before"):
        binding.enqueue(STREAM, 1)
    with pytest.raises(ConfigurationError, match="not the default one"):
        binding.prepare(0, 1)
    with pytest.raises(BackendError, match="these buffers hold 1 to 4"):
        binding.prepare(STREAM, 5)
    binding.close()
    binding.close()
    with pytest.raises(LifecycleError, match="closed"):
        binding.prepare(STREAM, 1)
    backend.close()
    with pytest.raises(LifecycleError, match="closed"):
        backend.bind(BUFFERS)


def test_a_fixed_batch_is_refused():
    import onnx

    bundle = small_bundle()
    model = onnx.load_model_from_string(bundle.network_bytes)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    with pytest.raises(NetworkMismatchError, match="'sample' is fixed"):
        list(ort_cuda._batch_names(model.SerializeToString()))


def test_the_batch_dimensions_name_is_read_from_the_file():
    assert set(ort_cuda._batch_names(small_bundle().network_bytes)) == {"n"}


def test_a_file_that_is_no_network_never_hangs_or_crashes():
    content = small_bundle().network_bytes
    for length in range(0, len(content), 7):
        for changed in (content[:length], content[:length] + b"\xff" * 12 + content[length:]):
            try:
                list(ort_cuda._batch_names(changed))
            except NetworkMismatchError:
                continue


def test_a_frozen_batch_really_freezes_every_tensor():
    options = onnxruntime.SessionOptions()
    for name in set(ort_cuda._batch_names(small_bundle().network_bytes)):
        options.add_free_dimension_override_by_name(name, 5)
    session = onnxruntime.InferenceSession(small_bundle().network_bytes, options, providers=[CPU])
    shapes = [argument.shape for argument in (*session.get_inputs(), *session.get_outputs())]
    assert all(shape[0] == 5 for shape in shapes)
