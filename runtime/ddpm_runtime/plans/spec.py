"""What a plan is asked to be, and what it was built for: the parts that decide whether it fits.

A plan is native code for one network, one library version and one kind of GPU. ``PlanKey`` names
all of it; two keys are equal exactly when one plan may stand for the other. Imports no library.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

from ..errors import ConfigurationError

if TYPE_CHECKING:
    from ..cuda.device import Device

__all__ = ["ANY", "Gpu", "PlanKey", "PlanSpec", "buckets_for"]

ANY = "any"

_WORDS = {
    "network_sha256": "the network",
    "library": "the library",
    "library_version": "the library's version",
    "gpu": "the GPU",
    "compute_capability": "the compute capability",
    "cuda": "the driver's CUDA version",
    "precision": "the precision",
    "buckets": "the batch sizes",
    "builder": "the builder's settings",
}


def buckets_for(capacity: int) -> tuple[int, ...]:
    """Batch sizes a plan holds for up to ``capacity`` rows: 1, 2, 4, … and the capacity itself.

    Raises:
        ConfigurationError: capacity < 1.
    """
    if capacity < 1:
        raise ConfigurationError(f"capacity must be ≥ 1; got {capacity}.")
    powers = (1 << exponent for exponent in range(capacity.bit_length()))
    return tuple(sorted({*(power for power in powers if power < capacity), capacity}))


@dataclass(frozen=True, kw_only=True)
class PlanSpec:
    """What to build.

    Args:
        buckets: batch sizes, each with a profile of exactly that size; increasing.
        precision: what the network's graph is in, for the cache's key and for people.
        sms: compute capabilities to build for, without a GPU: 86 is 8.6. TensorRT-RTX only; empty
            means the GPU of this machine.
        optimization_level: 0 to 5, how long to search; None leaves it to the library.
        tf32: let float32 layers round their inputs to ten bits. Off: then "fp32" means it.
        lane_independence: ask that matrix products and reductions treat every row of the batch
            alike (TensorRT's DISTRIBUTIVE_INDEPENDENCE). The library grants it to plans of one
            bucket only; for several it is left out.
        workspace_bytes: most device memory that one layer may use; None means no limit.

    Raises:
        ConfigurationError: an impossible value.
    """

    buckets: tuple[int, ...]
    precision: str = "fp32"
    sms: tuple[int, ...] = ()
    optimization_level: int | None = None
    tf32: bool = False
    lane_independence: bool = True
    workspace_bytes: int | None = None

    def __post_init__(self) -> None:
        if not self.buckets or list(self.buckets) != sorted({*self.buckets}) or self.buckets[0] < 1:
            raise ConfigurationError(
                f"buckets must be increasing batch sizes ≥ 1; got {self.buckets}."
            )
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise ConfigurationError(
                f"optimization_level must lie in 0 to 5; got {self.optimization_level}."
            )
        if list(self.sms) != sorted({*self.sms}):
            raise ConfigurationError(f"sms must be increasing, like (80, 86); got {self.sms}.")

    @property
    def builder_settings(self) -> str:
        """Everything else that changes what is built, in one line."""
        settings = {
            "level": self.optimization_level,
            "tf32": self.tf32,
            "lane_independence": self.lane_independence,
            "workspace_bytes": self.workspace_bytes,
        }
        return json.dumps(settings, sort_keys=True)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The GPU of this machine, as far as plans care.

    Args:
        name: what the driver calls it.
        sm: compute capability times ten: 90 is 9.0.
        cuda: the CUDA version the driver supports ("13.0").
    """

    name: str
    sm: int
    cuda: str

    @classmethod
    def of(cls, device: Device) -> Gpu:
        """The GPU behind an open device."""
        version = int(device.driver.call("cuDriverGetVersion"))
        return cls(name=device.name, sm=device.sm, cuda=f"{version // 1000}.{version % 1000 // 10}")


@dataclass(frozen=True, kw_only=True)
class PlanKey:
    """Everything that decides what a plan is; every part is text.

    Args:
        network_sha256: of the ONNX bytes.
        library: "tensorrt" or "tensorrt_rtx".
        library_version: in full.
        gpu: the GPU's name; "any" for plans built by compute capability.
        compute_capability: one or several, with commas: "8.6,8.9".
        cuda: the driver's CUDA version; "any" for plans built without a GPU.
        precision: of the graph.
        buckets: batch sizes, with commas.
        builder: :attr:`PlanSpec.builder_settings`.
    """

    network_sha256: str
    library: str
    library_version: str
    gpu: str
    compute_capability: str
    cuda: str
    precision: str
    buckets: str
    builder: str

    @classmethod
    def of(
        cls, onnx_bytes: bytes, spec: PlanSpec, *, library: str, version: str, gpu: Gpu | None
    ) -> PlanKey:
        """The key of a plan about to be built.

        A plan for given compute capabilities runs on every GPU that has one of them; a plan for
        the GPU of this machine is tied to it.

        Raises:
            ConfigurationError: neither compute capabilities nor a GPU.
        """
        if spec.sms:
            name, capability, cuda = ANY, ",".join(map(_dotted, spec.sms)), ANY
        elif gpu is not None:
            name, capability, cuda = gpu.name, _dotted(gpu.sm), gpu.cuda
        else:
            raise ConfigurationError(
                "a plan is built for a GPU, and this machine shows none; name the compute "
                "capability it is for (--sm 89), which TensorRT-RTX can build for without one."
            )
        return cls(
            network_sha256=hashlib.sha256(onnx_bytes).hexdigest(),
            library=library,
            library_version=version,
            gpu=name,
            compute_capability=capability,
            cuda=cuda,
            precision=spec.precision,
            buckets=",".join(map(str, spec.buckets)),
            builder=spec.builder_settings,
        )

    @property
    def identity(self) -> str:
        """A file name that no other key has."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def differences(self, other: PlanKey) -> list[str]:
        """What differs from another key, in words: "the library's version: 10.13 → 10.16"."""
        found = []
        for field in fields(self):
            before, now = getattr(other, field.name), getattr(self, field.name)
            if before != now:
                if field.name == "network_sha256":
                    before, now = f"{before[:8]}…", f"{now[:8]}…"
                found.append(f"{_WORDS[field.name]}: {before} → {now}")
        return found

    def misfits(self, *, library: str, version: str, gpu: Gpu) -> list[str]:
        """Why a plan with this key must not be loaded here, in words; empty when it fits."""
        found = []
        pairs = [
            ("library", self.library, library),
            ("library_version", self.library_version, version),
            ("gpu", self.gpu, gpu.name),
            ("cuda", self.cuda, gpu.cuda),
        ]
        for name, built_for, here in pairs:
            if built_for not in (here, ANY):
                found.append(f"{_WORDS[name]} is {here} here, {built_for} in the plan")
        if _dotted(gpu.sm) not in self.compute_capability.split(","):
            found.append(
                f"the compute capability is {_dotted(gpu.sm)} here, {self.compute_capability} in "
                "the plan"
            )
        return found


def _dotted(sm: int) -> str:
    return f"{sm // 10}.{sm % 10}"
