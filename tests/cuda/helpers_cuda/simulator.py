"""A CUDA driver that is not there: the functions of cuda.bindings.driver over host memory.

Work is queued as a real stream would, and done as late as the rules allow: only when the host
waits for it, in stream order, and across streams only as far as an event says. So a missing wait
shows as stale data, and a buffer that is reused too early as wrong data. Kernels are run by
whatever is given (the g++ build, or the PTX interpreter). Every call is logged, and its arguments
are counted against the signature of the real binding.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from cuda.bindings import driver as real

from ddpm_runtime.cuda.driver import Driver, start_driver
from ddpm_runtime.cuda.layout import State

from .simulated_measuring import Measuring
from .simulated_parts import (
    Code,
    DriverFailure,
    NodeParameters,
    SimulatedGraph,
    SimulatedStream,
)

POISON, REDZONE, ALIGNMENT = 0xA5, 256, 256
BLOCKING = {"cuStreamSynchronize", "cuEventSynchronize", "cuCtxSynchronize", "cuMemcpyHtoD"}
NOT_WHILE_CAPTURING = BLOCKING | {
    *("cuMemAlloc", "cuMemFree", "cuMemAllocHost", "cuMemFreeHost"),
    *("cuModuleLoadData", "cuModuleGetFunction", "cuModuleUnload"),
}
STATE = ctypes.sizeof(State)
PARAMETER_BYTES = {
    "ddpm_advance": (STATE,),
    "ddpm_advance_loop": (STATE, 8),
    "ddpm_update": (STATE,),
    "ddpm_start": (STATE, 8),
    "ddpm_collect": (STATE, 8, 8),
    "ddpm_pixels": (STATE, 8, 8, 4),
    "test_network": (8, 8, 8, 8, 4, 4, 4),
}


class SimulatedDriver(Measuring):
    """Give ``started()`` to ``open_device``.

    Args:
        kernels: runs a kernel: ``launch(name, grid, threads, parameters)``, and ``conditions``.
        memory_bytes: the device's memory.
        version: what cuDriverGetVersion says.
        sm: the compute capability, 90 for 9.0.
        devices: how many GPUs there are.
    """

    CUgraphNodeParams = NodeParameters

    def __init__(
        self,
        kernels: Any = None,
        *,
        memory_bytes: int = 1 << 30,
        version: int = 13000,
        sm: int = 90,
        devices: int = 1,
    ) -> None:
        self.kernels, self.version, self.sm, self.devices = kernels, version, sm, devices
        self.memory_bytes = memory_bytes
        self.log: list[str] = []
        self.launches: list[str] = []
        self.failures: dict[str, list[Code | None]] = {}
        self.memory: dict[int, tuple[np.ndarray, int, str]] = {}
        self.handles: dict[int, Any] = {}
        self.retained = 0

    def started(self) -> Driver:
        return start_driver(Driver(self))

    def fail(self, function: str, code: Code, *, after: int = 0, times: int = 1) -> None:
        """Let calls of a function fail, so many times, after so many that work."""
        self.failures[function] = [None] * after + [code] * times

    def calls(self, *leave_out: str) -> list[str]:
        """The log without some functions."""
        return [call for call in self.log if call not in leave_out]

    def host_function(self, stream: int, work: Callable[[], None]) -> None:
        """Enqueue Python work: how a simulated network puts itself on a stream."""
        self.log.append("network")
        self._enqueue(stream, work)

    def check_memory(self) -> None:
        """Nothing was written outside what was allocated."""
        for address, (array, size, kind) in self.memory.items():
            start = address - array.ctypes.data
            outside = np.concatenate([array[:start], array[start + size :]])
            assert (outside == POISON).all(), f"{kind} memory of {size} bytes was overrun"

    def region(self, address: int) -> tuple[int, int] | None:
        """The allocation that holds an address: its start and size."""
        for start, (_, size, _kind) in self.memory.items():
            if start <= address < start + size:
                return start, size
        return None

    # --- the bindings' shape: every function answers (status, values …) ------------------------

    def __getattr__(self, name: str) -> Any:
        if name.startswith("cu") and hasattr(real, name):
            return functools.partial(self._call, name)
        if name.startswith("CU"):
            return getattr(real, name)
        raise AttributeError(name)

    def _call(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        expected = len(inspect.signature(getattr(real, name)).parameters)
        assert len(arguments) == expected, f"{name} takes {expected} arguments: {arguments}"
        if not name.startswith("cuGetError"):
            self.log.append(name)
        planned = self.failures.get(name)
        try:
            if planned and (code := planned.pop(0)) is not None:
                if name == "cuStreamEndCapture":  # a capture that fails is over all the same
                    self.handles[int(arguments[0])].captures_into = None
                raise DriverFailure(code)
            if name in NOT_WHILE_CAPTURING:
                self._forbid_while_capturing()
            answer = getattr(self, f"_{name}")(*arguments)
        except DriverFailure as failure:
            return failure.code, None
        values = () if answer is None else answer if isinstance(answer, tuple) else (answer,)
        return (Code.CUDA_SUCCESS, *values)

    def _forbid_while_capturing(self) -> None:
        for stream in self.handles.values():
            if isinstance(stream, SimulatedStream) and stream.captures_into is not None:
                stream.broken = True
                raise DriverFailure(Code.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)

    def _keep(self, thing: Any) -> int:
        handle = 0x1000 + 16 * len(self.handles)
        while handle in self.handles:
            handle += 16
        self.handles[handle] = thing
        return handle

    def _drop(self, handle: Any) -> None:
        del self.handles[int(handle)]

    def _enqueue(self, stream: Any, work: Callable[[], None]) -> None:
        found = self.handles[int(stream)]
        if found.captures_into is not None:
            found.captures_into.work.append(work)
        else:
            found.queue.append(work)

    # --- device and memory ---------------------------------------------------------------------

    def _cuInit(self, flags):
        pass

    def _cuDriverGetVersion(self):
        return self.version

    def _cuDeviceGetCount(self):
        return self.devices

    def _cuDeviceGet(self, ordinal):
        return ordinal

    def _cuDeviceGetName(self, length, device):
        return b"Simulated GPU".ljust(length, b"\0")

    def _cuDeviceGetAttribute(self, attribute, device):
        return self.sm // 10 if "MAJOR" in attribute.name else self.sm % 10

    def _cuDevicePrimaryCtxRetain(self, device):
        self.retained += 1
        return 0xC0

    def _cuDevicePrimaryCtxRelease(self, device):
        self.retained -= 1

    def _cuCtxSetCurrent(self, context):
        assert int(context) == 0xC0

    def _allocate(self, size: int, kind: str) -> int:
        assert size > 0
        used = sum(size for _, size, k in self.memory.values() if k == "device")
        if kind == "device" and used + size > self.memory_bytes:
            raise DriverFailure(Code.CUDA_ERROR_OUT_OF_MEMORY)
        array = np.full(size + 2 * REDZONE + ALIGNMENT, POISON, np.uint8)
        address = -(-(array.ctypes.data + REDZONE) // ALIGNMENT) * ALIGNMENT
        self.memory[address] = array, size, kind
        return address

    def _release(self, address: Any) -> None:
        for handle in self.handles.values():  # cuMemFree waits for the device
            if isinstance(handle, SimulatedStream):
                handle.run()
        self.check_memory()
        del self.memory[int(address)]

    def _cuMemAlloc(self, size):
        return self._allocate(size, "device")

    def _cuMemAllocHost(self, size):
        return self._allocate(size, "pinned")

    def _cuMemFree(self, address):
        self._release(address)

    def _cuMemFreeHost(self, address):
        self._release(address)

    def _inside(self, address: int, size: int) -> None:
        start, held = self.region(address) or (0, 0)
        assert address + size <= start + held, "a copy reaches outside device memory"

    def _cuMemcpyHtoDAsync(self, destination, source, size, stream):
        self._inside(destination, size)
        self._enqueue(stream, lambda: ctypes.memmove(destination, source, size))

    def _cuMemcpyDtoHAsync(self, destination, source, size, stream):
        self._inside(source, size)
        self._enqueue(stream, lambda: ctypes.memmove(destination, source, size))

    def _cuMemsetD8Async(self, destination, byte, size, stream):
        self._inside(destination, size)
        self._enqueue(stream, lambda: ctypes.memset(destination, byte, size))

    def _cuMemsetD32Async(self, destination, word, count, stream):
        self._inside(destination, 4 * count)
        words = (ctypes.c_uint32 * count)(*[word] * count)
        self._enqueue(stream, lambda: ctypes.memmove(destination, words, 4 * count))

    # --- streams and events --------------------------------------------------------------------

    def _cuStreamCreate(self, flags):
        return self._keep(SimulatedStream())

    def _cuStreamDestroy(self, stream):
        self.handles[int(stream)].run()
        self._drop(stream)

    def _cuStreamSynchronize(self, stream):
        self.handles[int(stream)].run()

    def _cuStreamWaitEvent(self, stream, event, flags):
        marker = self.handles[int(event)]["marker"]
        self._enqueue(stream, lambda: marker.stream.run(until=marker))

    # --- kernels -------------------------------------------------------------------------------

    def _cuModuleLoadData(self, image):
        if not image.startswith(b"\x7fELF"):
            raise DriverFailure(Code.CUDA_ERROR_INVALID_IMAGE)
        return self._keep(bytes(image))

    def _cuModuleUnload(self, module):
        self._drop(module)

    def _cuModuleGetFunction(self, module, name):
        if b"\0" + name + b"\0" not in self.handles[int(module)]:
            raise DriverFailure(Code.CUDA_ERROR_NOT_FOUND)
        return name.decode()

    def _cuLaunchKernel(self, name, gx, gy, gz, bx, by, bz, shared, stream, pointers, extra):
        assert (gz, by, bz, shared, extra) == (1, 1, 1, 0, 0)
        assert 0 < gy < 65536
        short = name.removesuffix("_vector").removesuffix("_scalar")
        sizes = PARAMETER_BYTES[short]
        short = short.removeprefix("ddpm_")
        where = (ctypes.c_void_p * len(sizes)).from_address(pointers)
        parameters = [ctypes.string_at(at, size) for at, size in zip(where, sizes, strict=True)]

        def work() -> None:
            self.launches.append(short)
            if self.kernels is not None:
                self.kernels.launch(name, (gx, gy), bx, parameters)

        self.log[-1] += f" {short}"
        self._enqueue(stream, work)

    # --- graphs --------------------------------------------------------------------------------

    def _cuStreamBeginCapture(self, stream, mode):
        assert mode == real.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._begin(stream, SimulatedGraph())

    def _cuStreamBeginCaptureToGraph(self, stream, graph, dependencies, data, count, mode):
        assert (dependencies, data, count) == (None, None, 0)
        self._begin(stream, self.handles[int(graph)])

    def _begin(self, stream: Any, graph: SimulatedGraph) -> None:
        found = self.handles[int(stream)]
        assert found.captures_into is None
        found.captures_into, found.broken = graph, False

    def _cuStreamEndCapture(self, stream):
        found = self.handles[int(stream)]
        graph, found.captures_into = found.captures_into, None
        if found.broken:
            raise DriverFailure(Code.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED)
        known = [h for h, thing in self.handles.items() if thing is graph]
        return known[0] if known else self._keep(graph)

    def _cuGraphCreate(self, flags):
        return self._keep(SimulatedGraph())

    def _cuGraphConditionalHandleCreate(self, graph, context, default, flags):
        assert (default, flags) == (1, 1)
        self.handles[int(graph)].condition = 1
        return 1

    def _cuGraphAddNode(self, graph, dependencies, data, count, node):
        found = self.handles[int(graph)]
        assert node.type == real.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
        wanted = node.conditional
        assert wanted.type == real.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_WHILE
        assert (wanted.handle, wanted.size, int(wanted.ctx)) == (found.condition, 1, 0xC0)
        found.body = SimulatedGraph()
        wanted.phGraph_out = [self._keep(found.body)]
        return 0xD0

    def _cuGraphInstantiate(self, graph, flags):
        return self._keep(self.handles[int(graph)])

    def _cuGraphUpload(self, executable, stream):
        assert int(executable) in self.handles

    def _cuGraphLaunch(self, executable, stream):
        graph = self.handles[int(executable)]
        assert self.handles[int(stream)].captures_into is None

        def work() -> None:
            for one in list(graph.work):
                one()
            if graph.body is not None:
                self._repeat(graph)

        self._enqueue(stream, work)

    def _repeat(self, graph: SimulatedGraph) -> None:
        conditions = self.kernels.conditions
        conditions[graph.condition] = 1
        rounds = 0
        while conditions[graph.condition]:
            for one in list(graph.body.work):
                one()
            rounds += 1
            assert rounds < 10_000, "the loop does not end"

    def _cuGraphExecDestroy(self, executable):
        self._drop(executable)

    def _cuGraphDestroy(self, graph):
        found = self.handles[int(graph)]
        if found.body is not None:  # a graph owns its bodies
            self._drop(next(h for h, thing in self.handles.items() if thing is found.body))
        self._drop(graph)

    def _cuGetErrorName(self, code):
        return code.name.encode()

    def _cuGetErrorString(self, code):
        return b"simulated"
