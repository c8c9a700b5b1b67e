"""A TensorRT module that has exactly the members of a real version, and writes every use down.

The members come from tensorrt_api.json (make_api_surface.py), so ``hasattr`` answers as it would
there, and a call that version does not have, or with the wrong number of arguments, fails the test.
What the methods answer is set in ``FakeTensorRT``: enough of a builder and an engine for our code.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

API = json.loads(Path(__file__).with_name("tensorrt_api.json").read_text())
VERSIONS = tuple(API)

SMALL = {
    "sample": (-1, 1, 8, 8),
    "timestep": (-1,),
    "label": (-1,),
    "prediction": (-1, 1, 8, 8),
}


class Recorded:
    """An object of one class: only its members exist, and every use of them is written down."""

    def __init__(self, fake: FakeTensorRT, cls: str, **answers: Any) -> None:
        members = fake.classes[cls]
        assert members is not None, f"{cls} does not exist in {fake.__version__}"
        unknown = {name for name in answers if name not in members}
        object.__setattr__(self, "_state", (fake, cls, members, answers, unknown))

    def __getattr__(self, name: str) -> Any:
        fake, cls, members, answers, _ = self._state
        if name not in members:
            raise AttributeError(f"{cls} has no {name} in {fake.__version__}")
        if members[name] == "property":
            return answers.get(name)

        def call(*arguments: Any) -> Any:
            allowed = members[name]
            assert any(low <= len(arguments) <= high for low, high in allowed), (
                f"{cls}.{name} takes {allowed} arguments in {fake.__version__}; got {arguments}"
            )
            fake.calls.append((f"{cls}.{name}", *arguments))
            answer = answers.get(name)
            return answer(*arguments) if callable(answer) else answer

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        fake, cls, members, answers, _ = self._state
        assert members.get(name) == "property", f"{cls}.{name} cannot be set in {fake.__version__}"
        fake.calls.append((f"{cls}.{name} =", value))
        answers[name] = value


class Memory(bytes):
    """IHostMemory: bytes with a size."""

    @property
    def nbytes(self) -> int:
        return len(self)


class FakeTensorRT:
    """A module; ``calls`` is everything that was done with it.

    Args:
        version: one of :data:`VERSIONS`.
        tensors: shapes of the network's inputs and outputs, by name.
        buckets: batch sizes of the plan that a runtime loads.
        refuse: members that answer "no", like "Builder.build_serialized_network".
    """

    def __init__(
        self,
        version: str = "11.4",
        *,
        tensors: dict[str, tuple[int, ...]] | None = None,
        buckets: tuple[int, ...] = (1, 2, 4),
        refuse: tuple[str, ...] = (),
    ) -> None:
        self.classes = API[version]["classes"]
        self.__version__ = API[version]["version"]
        self.__name__ = "tensorrt_rtx" if version == "rtx" else "tensorrt"
        self.tensors = SMALL if tensors is None else tensors
        self.buckets = buckets
        self.refuse = refuse
        self.calls: list[tuple[Any, ...]] = []
        self.runs: list[tuple[int, int]] = []  # (profile, stream) of every execution
        self.says = ""  # what the logger is told when something is refused
        self.kernels = Memory(b"compiled kernels")
        self.capturable = True
        self.execute: Callable[[dict[str, int], int, int], None] | None = None
        """What an execution does: (addresses by tensor, batch size, stream)."""
        for name, members in self.classes.items():
            numbers = {k: v for k, v in (members or {}).items() if isinstance(v, int)}
            if numbers:
                setattr(self, name, enum.IntEnum(name, numbers))
        self.ILogger = self._base("ILogger")
        self.IProgressMonitor = self._base("IProgressMonitor")

    def names(self) -> list[str]:
        """The calls without their arguments."""
        return [call[0] for call in self.calls]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or self.classes.get(name) is None:
            raise AttributeError(f"no {name} in {self.__version__}")
        makers = {"Builder": self._builder, "OnnxParser": self._parser, "Runtime": self._runtime}
        if name not in makers:
            raise AttributeError(f"{name} cannot be made here")

        def make(*arguments: Any) -> Any:
            self.calls.append((name, *arguments))
            return makers[name](*arguments)

        return make

    def answer(self, member: str, granted: Any, refused: Any = None) -> Callable[..., Any]:
        """A method's answer: ``granted``, unless the test wants it refused."""

        def call(*arguments: Any) -> Any:
            if member in self.refuse:
                if self.says:
                    self._logger.log(self.ILogger.ERROR, self.says)
                return refused
            return granted(*arguments) if callable(granted) else granted

        return call

    # --- building ------------------------------------------------------------------------------

    def _builder(self, logger: Any) -> Recorded:
        self._logger = logger
        return Recorded(
            self,
            "Builder",
            create_network=self._network,
            create_builder_config=self._config,
            create_optimization_profile=lambda: Recorded(self, "IOptimizationProfile"),
            build_serialized_network=self.answer("Builder.build_serialized_network", self._build),
        )

    def _network(self, flags: int) -> Recorded:
        inputs = [
            SimpleNamespace(name=name, shape=shape)
            for name, shape in self.tensors.items()
            if name != "prediction"
        ]
        return Recorded(
            self,
            "INetworkDefinition",
            num_inputs=len(inputs),
            get_input=lambda index: inputs[index],
            num_layers=17,
        )

    def _parser(self, network: Recorded, logger: Any) -> Recorded:
        error = Recorded(self, "ParserError", desc="unsupported", node_name="conv_in")
        return Recorded(
            self,
            "OnnxParser",
            parse=self.answer("OnnxParser.parse", granted=True, refused=False),
            num_errors=1,
            get_error=lambda index: error,
        )

    def _config(self) -> Recorded:
        cache = Recorded(self, "ITimingCache", serialize=lambda: Memory(b"timings"))
        return Recorded(
            self,
            "IBuilderConfig",
            add_optimization_profile=self.answer("IBuilderConfig.add_optimization_profile", 0, -1),
            create_timing_cache=lambda content: cache,
            set_timing_cache=self.answer("IBuilderConfig.set_timing_cache", True, False),
            get_timing_cache=lambda: cache,
            set_compute_capability=True,
        )

    def _build(self, network: Recorded, config: Recorded) -> Memory:
        monitor = config.progress_monitor
        monitor.phase_start("Building", None, 2)
        assert monitor.step_complete("Building", 0)
        monitor.phase_finish("Building")
        return Memory(b"a plan")

    # --- running -------------------------------------------------------------------------------

    def _runtime(self, logger: Any) -> Recorded:
        self._logger = logger
        return Recorded(
            self,
            "Runtime",
            deserialize_cuda_engine=self.answer("Runtime.deserialize_cuda_engine", self._engine),
        )

    def _engine(self, payload: bytes) -> Recorded:
        names = list(self.tensors)
        types = {"label": self.DataType.INT64}
        return Recorded(
            self,
            "ICudaEngine",
            num_io_tensors=len(names),
            num_optimization_profiles=len(self.buckets),
            get_tensor_name=lambda index: names[index],
            get_tensor_mode=lambda name: (
                self.TensorIOMode.OUTPUT if name == "prediction" else self.TensorIOMode.INPUT
            ),
            get_tensor_dtype=lambda name: types.get(name, self.DataType.FLOAT),
            get_tensor_shape=lambda name: self.tensors[name],
            get_tensor_location=lambda name: self.TensorLocation.DEVICE,
            get_tensor_profile_shape=lambda name, index: (
                [(self.buckets[index], *self.tensors[name][1:])] * 3
            ),
            get_device_memory_size_for_profile_v2=lambda index: 1000 * self.buckets[index],
            create_execution_context=self.answer(
                "ICudaEngine.create_execution_context", self._context
            ),
            create_runtime_config=self._runtime_config,
        )

    def _runtime_config(self) -> Recorded:
        cache = Recorded(self, "IRuntimeCache", serialize=lambda: self.kernels, deserialize=True)
        return Recorded(
            self, "IRuntimeConfig", create_runtime_cache=lambda: cache, set_runtime_cache=True
        )

    def _context(self, strategy_or_config: Any) -> Recorded:
        profile: list[int] = []
        addresses: dict[str, int] = {}

        def set_address(name: str, address: int) -> bool:
            addresses[name] = address
            return True

        def set_profile(index: int, stream: int) -> bool:
            profile.append(index)
            return True

        def execute(stream: int) -> bool:
            self.runs.append((profile[-1], stream))
            if self.execute is not None:
                self.execute(addresses, self.buckets[profile[-1]], stream)
            return True

        answers: dict[str, Any] = {
            "set_optimization_profile_async": self.answer(
                "IExecutionContext.set_optimization_profile_async", set_profile, False
            ),
            "set_input_shape": self.answer("IExecutionContext.set_input_shape", True, False),
            "set_tensor_address": self.answer(
                "IExecutionContext.set_tensor_address", set_address, False
            ),
            "infer_shapes": self.answer("IExecutionContext.infer_shapes", [], ["sample"]),
            "execute_async_v3": self.answer("IExecutionContext.execute_async_v3", execute, False),
        }
        if "is_stream_capturable" in self.classes["IExecutionContext"]:
            answers["is_stream_capturable"] = lambda stream: self.capturable
        return Recorded(self, "IExecutionContext", **answers)

    def _base(self, name: str) -> type:
        """A class to inherit from, with its numbers if it has any."""
        numbers = {k: v for k, v in self.classes[name].items() if isinstance(v, int)}
        return type(name, (), numbers)
