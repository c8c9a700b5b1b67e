"""What the plan tests share: a GPU, a device, a bundle, keys."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ddpm_runtime.bundle import Bundle, Defaults, Image, Manifest, Network
from ddpm_runtime.errors import OutOfDeviceMemoryError
from ddpm_runtime.plans import Gpu, PlanKey, PlanSpec
from ddpm_runtime.schedule import make_schedule
from helpers.tiny_engine import tiny_network_bytes

GPU = Gpu(name="NVIDIA Test", sm=89, cuda="13.0")


def small_bundle(*, num_classes: int = 3, precision: str = "fp32") -> Bundle:
    """An 8×8 grey bundle, in memory."""
    manifest = Manifest(
        name="tiny",
        image=Image(height=8, width=8, channels=1),
        network=Network(
            prediction_type="epsilon", num_classes=num_classes, opset=18, precision=precision
        ),
        schedule={"name": "linear", "num_train_timesteps": 100},
        defaults=Defaults(),
    )
    return Bundle(
        manifest=manifest,
        network_bytes=tiny_network_bytes(num_classes=num_classes),
        schedule=make_schedule(**manifest.schedule),
    )


def key_for(
    onnx_bytes: bytes = b"network",
    *,
    library: str = "tensorrt",
    version: str = "10.13",
    **spec: Any,
) -> PlanKey:
    """A key on the test GPU."""
    spec.setdefault("buckets", (1, 2, 4))
    return PlanKey.of(onnx_bytes, PlanSpec(**spec), library=library, version=version, gpu=GPU)


class FakeDevice:
    """A device that hands out addresses and writes down what is asked of its driver."""

    def __init__(self, log: list[tuple[Any, ...]], gpu: Gpu = GPU, memory: int = 1 << 40) -> None:
        self.log = log
        self.name, self.sm, self.ordinal = gpu.name, gpu.sm, 0
        self._memory = memory
        self._version = int(float(gpu.cuda) * 1000)
        self.driver = SimpleNamespace(call=self._call)
        self.open_memory: set[int] = set()

    def make_current(self) -> None:
        self.log.append(("make_current",))

    def allocate(self, size_bytes: int) -> SimpleNamespace:
        if size_bytes > self._memory:
            raise OutOfDeviceMemoryError(f"cannot allocate {size_bytes} bytes")
        address = 0x7000_0000 + 0x1000 * len(self.log)
        self.log.append(("allocate", size_bytes))
        self.open_memory.add(address)

        def close() -> None:
            self.log.append(("free", size_bytes))
            self.open_memory.discard(address)

        return SimpleNamespace(address=address, size_bytes=size_bytes, close=close)

    def _call(self, name: str, *arguments: Any, purpose: str = "") -> Any:
        self.log.append((name, *arguments))
        return self._version if name == "cuDriverGetVersion" else None
