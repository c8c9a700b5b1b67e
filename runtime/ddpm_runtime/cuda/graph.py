"""A CUDA graph as a small state machine: work captured once, replayed with one call.

    begin_capture ──▶ end_capture ──▶ instantiate ──▶ launch … launch ──▶ close
          │  abort ◀──────┘ on failure: back to the start

A loop graph is one conditional WHILE node; what is captured becomes its body, which is repeated
until a kernel in it sets the condition to 0. A graph keeps the addresses it was captured with:
buffers are allocated before, and a graph for other buffers is another graph.
"""

from __future__ import annotations

import contextlib
from enum import Enum
from typing import Any

from ..errors import BackendError, LifecycleError
from .device import Device, Stream

__all__ = ["DeviceGraph", "GraphState"]

_ASSIGN_DEFAULT = (
    1  # CU_GRAPH_COND_ASSIGN_DEFAULT: the condition starts every launch at its default
)


class GraphState(Enum):
    """Where a graph is; the value is the call that comes next."""

    EMPTY = "begin_capture()"
    CAPTURING = "end_capture()"
    CAPTURED = "instantiate()"
    READY = "launch()"
    CLOSED = "a new graph"


class DeviceGraph:
    """One graph on one device.

    Args:
        device: where it runs.
        loop: make the captured work the body of a WHILE node.
    """

    def __init__(self, device: Device, *, loop: bool = False) -> None:
        self.state = GraphState.EMPTY
        self._device = device
        self._loop = loop
        self._stream: Any = None
        self._graph: Any = None
        self._executable: Any = None
        self._condition: Any = None

    @property
    def condition(self) -> int:
        """The handle of a loop graph's condition, for the kernel that sets it.

        Raises:
            LifecycleError: not a loop graph, or nothing is being captured.
        """
        self._expect(GraphState.CAPTURING, "condition")
        if self._condition is None:
            raise LifecycleError("this graph has no condition; make it with loop=True.")
        return int(self._condition)

    def begin_capture(self, stream: Stream) -> None:
        """Record what is enqueued on the stream from now on, instead of running it.

        Raises:
            GraphError: the driver refuses.
            LifecycleError: not the first call.
        """
        self._expect(GraphState.EMPTY, "begin_capture()")
        driver = self._device.driver
        mode = driver.api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        try:
            if self._loop:
                body = self._add_while_node()
                driver.call("cuStreamBeginCaptureToGraph", stream.handle, body, None, None, 0, mode)
            else:
                driver.call("cuStreamBeginCapture", stream.handle, mode)
        except BackendError:
            self._destroy()
            raise
        self._stream = stream
        self.state = GraphState.CAPTURING

    def end_capture(self) -> None:
        """Stop recording.

        Raises:
            GraphError: something that cannot be captured was enqueued; the graph is empty again.
            LifecycleError: nothing is being captured.
        """
        self._expect(GraphState.CAPTURING, "end_capture()")
        try:
            captured = self._device.driver.call("cuStreamEndCapture", self._stream.handle)
        except BackendError:
            self._destroy()
            self.state = GraphState.EMPTY
            raise
        if not self._loop:
            self._graph = captured
        self.state = GraphState.CAPTURED

    def abort(self) -> None:
        """Give up a capture, whatever state it is in, so that the stream can be used again."""
        if self.state is not GraphState.CAPTURING:
            return
        with contextlib.suppress(BackendError):  # a broken capture ends with an error
            captured = self._device.driver.call("cuStreamEndCapture", self._stream.handle)
            if not self._loop:
                self._graph = captured
        self._destroy()
        self.state = GraphState.EMPTY

    def instantiate(self, stream: Stream) -> None:
        """Make the graph executable, and bring it to the device.

        Raises:
            GraphError: the driver refuses.
            LifecycleError: nothing was captured.
        """
        self._expect(GraphState.CAPTURED, "instantiate()")
        driver = self._device.driver
        self._executable = driver.call("cuGraphInstantiate", self._graph, 0)
        driver.call("cuGraphUpload", self._executable, stream.handle)
        self.state = GraphState.READY

    def launch(self, stream: Stream) -> None:
        """Replay the captured work in stream order; returns at once.

        Raises:
            LifecycleError: the graph is not instantiated.
        """
        self._expect(GraphState.READY, "launch()")
        self._device.driver.call("cuGraphLaunch", self._executable, stream.handle)

    def close(self) -> None:
        """Release the graph. Idempotent."""
        self.abort()
        self._destroy()
        self.state = GraphState.CLOSED

    def _add_while_node(self) -> Any:
        """Make the graph's one node; return the graph that is its body."""
        driver, api = self._device.driver, self._device.driver.api
        self._graph = driver.call("cuGraphCreate", 0)
        self._condition = driver.call(
            "cuGraphConditionalHandleCreate", self._graph, self._device.context, 1, _ASSIGN_DEFAULT
        )
        node = api.CUgraphNodeParams()
        node.type = api.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
        node.conditional.handle = self._condition
        node.conditional.type = api.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_WHILE
        node.conditional.size = 1
        node.conditional.ctx = self._device.context
        driver.call("cuGraphAddNode", self._graph, None, None, 0, node)
        return node.conditional.phGraph_out[0]

    def _destroy(self) -> None:
        executable, graph = self._executable, self._graph
        self._executable = self._graph = self._condition = self._stream = None
        if executable is not None:
            self._device.driver.call("cuGraphExecDestroy", executable)
        if graph is not None:
            self._device.driver.call("cuGraphDestroy", graph)

    def _expect(self, state: GraphState, call: str) -> None:
        if self.state is not state:
            raise LifecycleError(f"{call} came out of order; {self.state.value} comes first.")
