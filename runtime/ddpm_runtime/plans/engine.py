"""A plan in the library's hands: deserialised, checked against the manifest, ready for contexts."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import BackendError, NetworkMismatchError
from .cache import PlanCache
from .library import TensorRT
from .loading import LoadedPlan
from .spec import Gpu

__all__ = ["PlanEngine", "library_failure"]


class PlanEngine:
    """A deserialised plan. It lives as long as somebody holds it, and so do its weights.

    Args:
        plan: has passed every check of :mod:`.loading`.
        library: loads it.
        gpu: where it runs.
        cache: where RTX's compiled kernels are kept.
        tensors: every tensor the manifest promises, without its batch dimension; "label" is int64,
            the others are float32; all but "prediction" are inputs.
        label: the network's name, for people.

    Raises:
        BackendError: the library refuses the plan.
        OutOfDeviceMemoryError: its weights do not fit.
        NetworkMismatchError: its tensors or batch sizes are not what was promised.
    """

    def __init__(
        self,
        plan: LoadedPlan,
        library: TensorRT,
        gpu: Gpu,
        cache: PlanCache,
        *,
        tensors: Mapping[str, tuple[int, ...]],
        label: str,
    ) -> None:
        self.library = library
        self.buckets = plan.buckets
        self.reason = plan.reason
        self.tensors = dict(tensors)
        self._cache, self._label = cache, label
        self._kernels_key = dataclasses.replace(plan.key, gpu=gpu.name, cuda=gpu.cuda)
        self._runtime = library.module.Runtime(library.logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan.payload)
        if self._engine is None:
            raise library_failure(library, f"load the plan ({plan.reason})")
        self._check_tensors()
        self._check_profiles()
        self._config, self._kernels = self._runtime_config()
        self._kept = b""

    def workspace_bytes(self, profiles: Sequence[int]) -> int:
        """What the largest of some profiles needs."""
        return max(int(self._engine.get_device_memory_size_for_profile_v2(i)) for i in profiles)

    def new_context(self) -> Any:
        """An execution context without memory of its own.

        Raises:
            BackendError: the library refuses.
        """
        strategy = self.library.module.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(
            strategy if self._config is None else self._config
        )
        if context is None:
            raise library_failure(self.library, "make an execution context")
        return context

    def keep_kernels(self) -> None:
        """Keep what RTX compiled on this GPU, so that the next start need not."""
        if self._kernels is None:
            return
        memory = self._kernels.serialize()
        compiled = b"" if memory is None else bytes(memoryview(memory))
        if compiled and compiled != self._kept:
            self._cache.put(self._kernels_key, "kernels", compiled, label=self._label)
            self._kept = compiled

    def _runtime_config(self) -> tuple[Any, Any]:
        """RTX: its own graphs off (we capture), every kernel compiled before the first run."""
        trt = self.library.module
        if not self.library.is_rtx:
            return None, None
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        config.dynamic_shapes_kernel_specialization_strategy = (
            trt.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        kernels = config.create_runtime_cache()
        kept = self._cache.get(self._kernels_key, "kernels")
        if kept:
            kernels.deserialize(kept)  # False means another driver or GPU: it starts empty
        config.set_runtime_cache(kernels)
        return config, kernels

    def _check_tensors(self) -> None:
        """Compare the plan's inputs and outputs with what the manifest promises."""
        trt, engine = self.library.module, self._engine
        found = {}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            on_device = engine.get_tensor_location(name) == trt.TensorLocation.DEVICE
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            dimensions = tuple(engine.get_tensor_shape(name))[1:]
            found[name] = (engine.get_tensor_dtype(name), dimensions, is_input, on_device)
        expected = {
            name: (
                trt.DataType.INT64 if name == "label" else trt.DataType.FLOAT,
                dimensions,
                name != "prediction",
                True,
            )
            for name, dimensions in self.tensors.items()
        }
        if found != expected:
            raise NetworkMismatchError(
                f"the manifest describes the tensors {expected} (type, shape, input, on device); "
                f"the plan has {found}. Remove the plan; one is built from the bundle's network."
            )

    def _check_profiles(self) -> None:
        """Profile i must be batch size i, and nothing else."""
        profiles = [
            [next(iter(shape)) for shape in self._engine.get_tensor_profile_shape("sample", index)]
            for index in range(self._engine.num_optimization_profiles)
        ]
        if profiles != [[bucket] * 3 for bucket in self.buckets]:
            raise NetworkMismatchError(
                f"the plan says it holds batch sizes {self.buckets}; its profiles are {profiles}. "
                "Remove the plan; one is built from the bundle's network."
            )


def library_failure(library: TensorRT, what: str) -> BackendError:
    """The error for something the library would not do, with its own words.

    Args:
        library: which did not do it.
        what: "load the plan".
    """
    from ..errors import OutOfDeviceMemoryError

    words = library.last_words()
    if re.search(r"out ?of ?memory", words.replace("_", " "), re.IGNORECASE):
        return OutOfDeviceMemoryError(
            f"{library.title} cannot {what}: {words}. Choose a smaller batch size, or free memory "
            "that other processes hold on this GPU."
        )
    return BackendError(
        f"{library.title} cannot {what}: {words}. If it stays, remove the plan cache, and use "
        "--backend onnxruntime meanwhile."
    )
