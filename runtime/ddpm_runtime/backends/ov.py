"""OpenVINO on the CPU: static shapes, bfloat16 on request, compiled networks kept on disk.

OpenVINO's own Python package rather than its provider for ONNX Runtime: the provider refuses
processors that Intel did not make, cannot be given a network from memory, and is no faster.

Rows are evaluated in chunks of 1, 2, 4, … rows (see :mod:`.chunks`), each a network compiled for
that shape. OpenVINO may choose other kernels for another shape, which would give an image other
bits in another batch. So every shape is compared bit by bit with two rows at a time, on noise,
before it is used; one that differs is never used. The verdict is kept with the compiled network.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle import Bundle
from ..errors import (
    BackendError,
    ConfigurationError,
    LifecycleError,
    missing_extra,
)
from .base import CachedBinding, NetworkBinding, NetworkShape, no_step_cache
from .chunks import Chunk, chunks
from .ov_compiler import LARGEST_CHUNK, Compiler
from .processors import usable_processors
from .user_cache import UserCache

__all__ = ["OpenVinoBackend", "open_openvino"]

Arrays = dict[str, NDArray[Any]]


def open_openvino(
    bundle: Bundle,
    *,
    threads: int | None = None,
    precision: str = "auto",
    cache: UserCache | None = None,
) -> OpenVinoBackend:
    """Open a bundle's network in OpenVINO's CPU plugin. Shapes are compiled when first needed.

    Args:
        bundle: what :func:`~ddpm_runtime.bundle.read_bundle` returned.
        threads: threads inside an operator; None means the processors this process may use.
        precision: "bf16" computes in bfloat16, whose images differ; "auto", "fp32" in float32.
        cache: compiled networks; None means the user's.

    Raises:
        BackendUnavailableError: openvino is not installed.
        ConfigurationError: threads < 1; a precision that the bundle or the processor has not, or
            in which this network's answers are too far from float32's.
        NetworkMismatchError: inputs or outputs are not those of the manifest.
        BackendError: OpenVINO refuses the network.
    """
    computed = _check_precision(bundle, precision)
    if threads is not None and threads < 1:
        raise ConfigurationError(f"threads must be ≥ 1; got {threads}.")
    try:
        import openvino
    except ImportError as error:
        raise missing_extra("openvino", "run an engine with OpenVINO", "openvino") from error
    core = openvino.Core()
    capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if computed == "bf16" and "BF16" not in capabilities:
        raise ConfigurationError(
            "precision='bf16' was asked; this processor computes no bfloat16 "
            f"(it has {', '.join(sorted(capabilities))}). Use precision='fp32'."
        )
    compiler = Compiler(
        core, openvino, bundle, computed, threads or usable_processors(), cache or UserCache()
    )
    compiler.check()
    if computed == "bf16":
        compiler.require_near_float32(
            Compiler(core, openvino, bundle, "fp32", compiler.threads, compiler.cache)
        )
    return OpenVinoBackend(compiler, NetworkShape.from_bundle(bundle))


class OpenVinoBackend:
    """A network in OpenVINO; make it with :func:`open_openvino`."""

    name = "openvino"

    def __init__(self, compiler: Compiler, shape: NetworkShape) -> None:
        self._compiler: Compiler | None = compiler
        self.shape = shape
        self.description = compiler.description

    def allocate(self, capacity: int) -> NetworkBinding:
        """Make buffers for up to ``capacity`` network rows; compile the shapes they need.

        Raises:
            LifecycleError: the backend is closed.
            NetworkMismatchError: inputs or outputs are not those of the manifest.
            BackendError: OpenVINO refuses the network.
        """
        compiler = self._open_compiler()
        padded = -(-capacity // LARGEST_CHUNK) * LARGEST_CHUNK
        arrays = _buffers(self.shape, padded)
        plans: dict[int, list[Any]] = {}
        requests: dict[Chunk, Any] = {}

        def plan(rows: int) -> list[Any]:
            covering = chunks(rows, smallest=compiler.smallest(rows), largest=LARGEST_CHUNK)
            for chunk in covering:
                if chunk not in requests:
                    requests[chunk] = compiler.request(chunk, arrays)
            return [requests[chunk] for chunk in covering]

        def run(rows: int) -> None:
            self._open_compiler()
            if rows not in plans:
                plans[rows] = plan(rows)
            try:
                for request in plans[rows]:
                    request.infer()
            except Exception as error:  # OpenVINO raises RuntimeError for everything
                raise BackendError(f"OpenVINO failed on {rows} network rows: {error}") from error

        plans[capacity] = plan(capacity)
        compiler.forget_model()
        return NetworkBinding(
            sample=arrays["sample"][:capacity],
            timestep=arrays["timestep"][:capacity],
            label=arrays["label"][:capacity],
            prediction=arrays["prediction"][:capacity],
            run=run,
        )

    def allocate_cached(self, capacity: int) -> CachedBinding:
        """Step caching is not done with OpenVINO.

        Raises:
            ConfigurationError: always.
        """
        raise no_step_cache("OpenVINO")

    def close(self) -> None:
        """Release the network. Idempotent."""
        self._compiler = None

    def _open_compiler(self) -> Compiler:
        if self._compiler is None:
            raise LifecycleError("this backend is closed; load the engine again.")
        return self._compiler


def _check_precision(bundle: Bundle, precision: str) -> str:
    """fp32 or bf16: what the network is computed in."""
    own = bundle.manifest.network.precision
    if own != "fp32":
        raise ConfigurationError(
            f"this bundle is {own}, which is written in its graph; OpenVINO is given fp32 bundles "
            "only. Use backend='onnxruntime' with precision='auto', or export an fp32 bundle."
        )
    if precision not in ("auto", "fp32", "bf16"):
        raise ConfigurationError(
            f"precision={precision!r} was asked; on the processor there are fp32 and bf16. Use one "
            f"of them, or write a bundle with ddpm-export --precision {precision} for a GPU."
        )
    return "fp32" if precision == "auto" else precision


def _buffers(shape: NetworkShape, rows: int) -> Arrays:
    """Zeros that OpenVINO reads and writes in place."""
    channels, height, width = shape.image
    return {
        "sample": np.zeros((rows, channels, height, width), np.float32),
        "timestep": np.zeros(rows, np.float32),
        "label": np.zeros(rows, np.int64),
        "prediction": np.zeros((rows, shape.prediction_channels, height, width), np.float32),
    }
