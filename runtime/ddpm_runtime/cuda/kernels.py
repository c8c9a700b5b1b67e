"""Machine code for the device at hand: a cubin that ships with the package, else NVRTC.

A cubin made for X.y runs on every device X.z with z ≥ y. It is used only if it is the one that
``cubins/kernels.json`` names and was made from the sources that are here; where the driver refuses
it all the same, NVRTC is asked too. ``Kernels.origin`` says what was taken and why.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import BackendError, OutOfDeviceMemoryError
from .compiler import Compiled, compile_module, compiler_name, source_sha256
from .device import Device, Module

__all__ = ["CUBINS", "THREADS", "Kernels", "find_image", "load_kernels", "select_cubin"]

CUBINS = Path(__file__).parent / "cubins"
THREADS = 256  # a block


@dataclass(frozen=True, kw_only=True)
class Image:
    """Machine code, where it came from, and whether it ships with the package."""

    code: bytes
    origin: str
    shipped: bool


class Kernels:
    """The kernels, loaded on a device; make it with :func:`load_kernels`.

    Args:
        device: where they run.
        width: elements a thread does, 4 or 1; see update.cuh.
    """

    def __init__(self, device: Device, *, width: int) -> None:
        self._device = device
        self._suffix = {4: "vector", 1: "scalar"}[width]
        self._width = width
        self._step, self.origin = _load("step", device)
        self._loop: Module | None = None
        self.advance_loop: Any = None  # until load_loop()
        self.advance = self._step.function(f"ddpm_advance_{self._suffix}")
        self.update = self._step.function(f"ddpm_update_{self._suffix}")
        self.start = self._step.function("ddpm_start")
        self.collect = self._step.function("ddpm_collect")
        self.pixels = self._step.function("ddpm_pixels")

    def blocks(self, size: int, *, wide: bool) -> int:
        """Blocks for ``size`` elements, several a thread (``wide``) or one."""
        return -(-size // (THREADS * (self._width if wide else 1)))

    def load_loop(self) -> None:
        """Load ``advance_loop``, the head of a conditional WHILE node.

        Raises:
            BackendError: this driver cannot load it.
        """
        if self._loop is None:
            self._loop, _ = _load("loop", self._device)
            self.advance_loop = self._loop.function(f"ddpm_advance_loop_{self._suffix}")

    def close(self) -> None:
        """Unload the kernels. Idempotent."""
        self._step.close()
        if self._loop is not None:
            self._loop.close()


def load_kernels(device: Device, *, image_size: int) -> Kernels:
    """Load the kernels for images of this many elements.

    Raises:
        BackendError: neither a shipped cubin nor NVRTC serves this device.
    """
    width = 4 if image_size % 4 == 0 else 1
    return Kernels(device, width=width)


def find_image(module: str, sm: int, *, directory: Path = CUBINS) -> Image:
    """Machine code of one module for one architecture.

    Args:
        module: "step" or "loop".
        sm: 90 for compute capability 9.0.
        directory: where the cubins are.

    Raises:
        BackendError: there is none, and it cannot be compiled; says why for both.
    """
    code, reason = _shipped(module, sm, directory)
    if code is not None:
        return Image(code=code, origin=f"{reason}, shipped", shipped=True)
    return _compiled(module, sm, reason)


def select_cubin(sm: int, available: Iterable[int]) -> int | None:
    """The cubin that runs best on a device: its own, or the nearest before it of its major."""
    fitting = [made_for for made_for in available if made_for // 10 == sm // 10 and made_for <= sm]
    return max(fitting, default=None)


def _load(module: str, device: Device) -> tuple[Module, str]:
    """Load a module, and say where its code came from."""
    image = find_image(module, device.sm)
    try:
        return device.load(image.code), image.origin
    except OutOfDeviceMemoryError:
        raise
    except BackendError as error:
        if not image.shipped:
            raise
        image = _compiled(module, device.sm, f"the shipped code was refused: {error}")
    return device.load(image.code), image.origin


def _compiled(module: str, sm: int, reason: str) -> Image:
    """What NVRTC makes, for a reason."""
    try:
        compiled = _compile_once(module, sm)
    except BackendError as error:
        raise BackendError(
            f"no kernels for sm_{sm}: {reason}; and compiling them failed: {error}"
        ) from error
    origin = f"sm_{sm}, compiled by {compiler_name()}: {reason}"
    return Image(code=compiled.image, origin=origin, shipped=False)


@cache
def _compile_once(module: str, sm: int) -> Compiled:
    return compile_module(module, sm)


def _shipped(module: str, sm: int, directory: Path) -> tuple[bytes | None, str]:
    """A shipped cubin and its name, or None and why there is none."""
    try:
        index = json.loads((directory / "kernels.json").read_bytes())
    except OSError:
        return None, "this installation ships no cubins"
    if index["source_sha256"] != source_sha256():
        return None, (
            "the shipped cubins were made from other sources "
            "(run python -m ddpm_runtime.cuda.build_kernels)"
        )
    cubins = {entry["sm"]: entry for entry in index["cubins"] if entry["module"] == module}
    chosen = select_cubin(sm, cubins)
    if chosen is None:
        return None, f"cubins ship for sm_{', sm_'.join(map(str, sorted(cubins)))}"
    entry = cubins[chosen]
    try:
        code = (directory / entry["file"]).read_bytes()
    except OSError:
        return None, f"{entry['file']} is missing from this installation"
    if hashlib.sha256(code).hexdigest() != entry["sha256"]:
        return None, f"{entry['file']} is not the file that was built (its sha256 differs)"
    return code, f"sm_{chosen}"
