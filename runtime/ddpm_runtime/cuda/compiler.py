"""The kernels' sources, and NVRTC, which turns them into machine code.

One source makes two modules an architecture: ``step``, every kernel a row needs, and ``loop``, the
head of a conditional WHILE node, apart because older drivers cannot load it.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..errors import BackendError, BackendUnavailableError, choose, missing_extra

__all__ = ["MODULES", "OPTIONS", "Compiled", "compile_module", "compiler_name", "source_sha256"]

SOURCE = "update.cu"
HEADERS = ("portable_math.cuh", "update.cuh")
MODULES = {"step": (), "loop": ("-DDDPM_LOOP",)}
# no contraction, no flushing to zero: every operation is rounded as IEEE 754 says
OPTIONS = ("-std=c++17", "-fmad=false", "-ftz=false", "-prec-sqrt=true", "-prec-div=true")

_DIRECTORY = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """One module for one architecture.

    Args:
        image: the cubin, or PTX text.
        registers: registers a thread of each kernel takes.
        spill_bytes: bytes a thread of each kernel spills to memory.
    """

    image: bytes
    registers: dict[str, int]
    spill_bytes: dict[str, int]


@cache
def source_sha256() -> str:
    """Identifies sources and options together."""
    digest = hashlib.sha256(" ".join(OPTIONS).encode())
    for name in (SOURCE, *HEADERS):
        digest.update(b"\0" + name.encode() + b"\0" + _read(name))
    return digest.hexdigest()


def compiler_name() -> str:
    """NVRTC and its version, to the build where pip knows it.

    Raises:
        BackendUnavailableError: NVRTC is not installed.
    """
    try:
        return f"NVRTC {version('nvidia-cuda-nvrtc')}"
    except PackageNotFoundError:
        major, minor = _call(_nvrtc(), "nvrtcVersion")
        return f"NVRTC {major}.{minor}"


def compile_module(module: str, sm: int, *, target: str = "cubin") -> Compiled:
    """Compile one module.

    Args:
        module: one of :data:`MODULES`.
        sm: the architecture, 90 for compute capability 9.0.
        target: "cubin" or "ptx".

    Raises:
        BackendUnavailableError: NVRTC is not installed.
        BackendError: this NVRTC does not know the architecture, or refuses the source.
        ConfigurationError: unknown module or target.
    """
    choose("kernel module", module, MODULES)
    choose("target", target, ["cubin", "ptx"])
    nvrtc = _nvrtc()
    known = _call(nvrtc, "nvrtcGetSupportedArchs")
    if sm not in known:
        raise BackendError(
            f"{compiler_name()} knows the architectures {', '.join(map(str, known))}, not {sm}. "
            "Install a newer one with: pip install --upgrade nvidia-cuda-nvrtc"
        )
    kind = "sm" if target == "cubin" else "compute"
    options = (f"-arch={kind}_{sm}", *OPTIONS, "--ptxas-options=-v", *MODULES[module])
    program = _call(
        nvrtc,
        "nvrtcCreateProgram",
        _read(SOURCE),
        SOURCE.encode(),
        len(HEADERS),
        [_read(name) for name in HEADERS],
        [name.encode() for name in HEADERS],
    )
    try:
        status, *_ = nvrtc.nvrtcCompileProgram(
            program, len(options), [option.encode() for option in options]
        )
        log = _text(nvrtc, program, "ProgramLog").decode(errors="replace")
        if int(status) != 0:
            raise BackendError(f"{compiler_name()} refuses {SOURCE} for sm_{sm}:\n{log}")
        image = _text(nvrtc, program, "CUBIN" if target == "cubin" else "PTX")
    finally:
        _call(nvrtc, "nvrtcDestroyProgram", program)
    return _with_resources(image, log)


def _with_resources(image: bytes, log: str) -> Compiled:
    """Read what the assembler says of each kernel ("ptxas info" lines)."""
    registers, spills = {}, {}
    for block in log.split("Compiling entry function '")[1:]:
        name = block[: block.index("'")]
        registers[name] = int(re.findall(r"Used (\d+) registers", block)[0])
        spills[name] = sum(map(int, re.findall(r"(\d+) bytes spill", block)))
    return Compiled(image=image, registers=registers, spill_bytes=spills)


def _read(name: str) -> bytes:
    return (_DIRECTORY / name).read_bytes()


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise missing_extra("cuda-bindings", "compile the kernels", "cuda") from error
    return nvrtc


def _call(nvrtc: Any, name: str, *arguments: Any) -> Any:
    try:
        status, *values = getattr(nvrtc, name)(*arguments)
    except RuntimeError as error:  # the library beside the bindings is missing
        raise BackendUnavailableError(
            "NVRTC is needed to compile the kernels and is not installed. "
            "Install it with: pip install nvidia-cuda-nvrtc"
        ) from error
    if int(status) != 0:
        raise BackendError(f"{name} answered {status!r}. Compile with the nvidia-cuda-nvrtc wheel.")
    return values[0] if len(values) == 1 else tuple(values)


def _text(nvrtc: Any, program: Any, what: str) -> bytes:
    """A result of variable size: its size, then its bytes."""
    size: int = _call(nvrtc, f"nvrtcGet{what}Size", program)
    # one byte longer than needed: Python keeps a single shared object for each bytes of length 1,
    # and writing into that one would change it in the whole process
    text = b" " * (size + 1)
    _call(nvrtc, f"nvrtcGet{what}", program, text)
    return text[:size]
