"""Inference libraries that are not there, on the simulated device of tests/cuda.

The simulator queues work as a stream would; these run the real network in ONNX Runtime on the CPU
when its turn on the stream comes, reading and writing the addresses that our backends bound.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
from fake_tensorrt import FakeTensorRT

from ddpm_runtime.backends.base import NetworkShape
from ddpm_runtime.backends.ort_cuda import OrtCudaBackend, open_ort_cuda
from ddpm_runtime.backends.tensorrt import TensorRTBackend, open_tensorrt
from ddpm_runtime.bundle import Bundle
from ddpm_runtime.plans import PlanCache, library_of

sys.path.append(str(Path(__file__).parent.parent / "cuda"))
from helpers_cuda.host_build import EXACT, HostKernels, build
from helpers_cuda.simulator import SimulatedDriver

__all__ = ["SimulatedDriver", "host_kernels", "simulated_ort_cuda", "simulated_tensorrt"]


def host_kernels(folder: Path) -> HostKernels:
    """Our kernels, built by g++."""
    return HostKernels(build(folder / "exact", EXACT))


def on_stream(driver: SimulatedDriver, bundle: Bundle) -> Callable[..., None]:
    """What a library does with bound addresses: the network, when the stream gets there."""
    session = onnxruntime.InferenceSession(bundle.network_bytes, providers=["CPUExecutionProvider"])
    shape = NetworkShape.from_bundle(bundle)
    tensors = {
        "sample": shape.image,
        "timestep": (),
        "label": (),
        "prediction": (shape.prediction_channels, *shape.image[1:]),
    }

    def at(address: int, name: str, rows: int) -> np.ndarray:
        kind = np.dtype(np.int64 if name == "label" else np.float32)
        dimensions = (rows, *tensors[name])
        size = int(np.prod(dimensions)) * kind.itemsize
        return np.ndarray(dimensions, kind, buffer=(ctypes.c_uint8 * size).from_address(address))

    def execute(addresses: dict[str, int], rows: int, stream: int) -> None:
        def work() -> None:
            inputs = {n: at(a, n, rows) for n, a in addresses.items() if n != "prediction"}
            answer = session.run(["prediction"], inputs)[0]
            at(addresses["prediction"], "prediction", rows)[...] = answer

        driver.host_function(stream, work)

    return execute


def simulated_tensorrt(
    version: str,
    bundle: Bundle,
    device: Any,
    driver: SimulatedDriver,
    folder: Path,
    buckets: tuple[int, ...],
    **options: Any,
) -> TensorRTBackend:
    """The backend over a fake TensorRT of this version."""
    shape = NetworkShape.from_bundle(bundle)
    tensors: dict[str, tuple[int, ...]] = {"sample": (-1, *shape.image), "timestep": (-1,)}
    if shape.num_classes:
        tensors["label"] = (-1,)
    tensors["prediction"] = (-1, shape.prediction_channels, *shape.image[1:])
    fake = FakeTensorRT(version, buckets=buckets, tensors=tensors)
    fake.execute = on_stream(driver, bundle)
    cache = PlanCache(folder / "plans")
    library = library_of(fake)
    return open_tensorrt(bundle, device, library=library, cache=cache, buckets=buckets, **options)


class OptionsThatAllowTheCpu(onnxruntime.SessionOptions):
    """The one option that the stand-in, which does run on the CPU, cannot take."""

    def add_session_config_entry(self, key: str, value: str) -> None:
        assert (key, value) == ("session.disable_cpu_ep_fallback", "1")


def simulated_ort_cuda(
    bundle: Bundle, device: Any, driver: SimulatedDriver, monkeypatch: Any
) -> OrtCudaBackend:
    """The backend over a fake onnxruntime with a CUDA provider."""
    execute = on_stream(driver, bundle)

    def session(content: bytes, options: Any, *, providers: Any, enable_fallback: int) -> Any:
        stream = int(providers[0][1]["user_compute_stream"])
        real = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        bound: dict[str, tuple[int, int]] = {}

        def bind(name, kind, ordinal, element, shape, address):
            bound[name] = (address, shape[0])

        def run(io_binding, run_options=None):
            rows = {rows for _, rows in bound.values()}
            execute({name: address for name, (address, _) in bound.items()}, rows.pop(), stream)
            if run_options is None:
                driver._call("cuStreamSynchronize", stream)

        return SimpleNamespace(
            disable_fallback=lambda: None,
            get_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
            get_inputs=real.get_inputs,
            get_outputs=real.get_outputs,
            io_binding=lambda: SimpleNamespace(bind_input=bind, bind_output=bind),
            run_with_iobinding=run,
        )

    fake = SimpleNamespace(
        __version__="1.31.1",
        get_available_providers=lambda: ["CUDAExecutionProvider"],
        set_default_logger_severity=lambda level: None,
        SessionOptions=OptionsThatAllowTheCpu,
        RunOptions=onnxruntime.RunOptions,
        GraphOptimizationLevel=onnxruntime.GraphOptimizationLevel,
        InferenceSession=session,
    )
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", fake)
        return open_ort_cuda(bundle, device)
