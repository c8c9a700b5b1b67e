"""The kernels compiled by g++, from the very source that NVRTC compiles."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ddpm_runtime.cuda as cuda_package

SOURCES = Path(cuda_package.__file__).parent
HERE = Path(__file__).parent
EXACT = ("-O2", "-ffp-contract=off")
UNDEFINED = (*EXACT, "-fsanitize=undefined,float-cast-overflow", "-fno-sanitize-recover=all")


def contracting_flags() -> tuple[str, ...]:
    """Flags that let the compiler fuse a product and a sum: the negative control."""
    has_fma = ("-mfma",) if platform.machine() == "x86_64" else ()
    return ("-O2", "-ffp-contract=fast", *has_fma)


def build(directory: Path, flags: tuple[str, ...]) -> list[Path]:
    """Compile both modules; return the libraries."""
    compiler = shutil.which("g++")
    assert compiler, "g++ is needed for the CUDA tests: apt-get install g++"
    directory.mkdir(parents=True, exist_ok=True)
    libraries = [directory / "step.so", directory / "loop.so"]
    defines = [(), ("-DDDPM_LOOP",)]

    def compile_one(library: Path, define: tuple[str, ...]) -> str:
        command = [
            *(compiler, "-std=c++17", "-shared", "-fPIC", "-fno-strict-aliasing"),
            *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function"),
            *flags,
            *("-DDDPM_ON_HOST", *define, f"-I{SOURCES}", f"-I{HERE}"),
            *(str(HERE / "host_launch.cpp"), "-o", str(library)),
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=120).stderr

    with ThreadPoolExecutor() as pool:
        for library, errors in zip(
            libraries, pool.map(compile_one, libraries, defines), strict=True
        ):
            assert library.exists(), errors
    return libraries


class HostKernels:
    """Launches kernels on the CPU; a device address is a host address."""

    def __init__(self, libraries: list[Path]) -> None:
        self.step, self.loop = (ctypes.CDLL(str(library)) for library in libraries)
        self.conditions = (ctypes.c_uint32 * 64).in_dll(self.loop, "ddpm_conditions")
        self.step.ddpm_offset.restype = ctypes.c_int64

    def launch(self, name: str, grid: tuple[int, int], threads: int, parameters: list[bytes]):
        """Run one kernel; ``parameters`` are the bytes of each."""
        held = [ctypes.create_string_buffer(value, len(value)) for value in parameters]
        pointers = (ctypes.c_void_p * len(held))(*map(ctypes.addressof, held))
        library = self.loop if "loop" in name else self.step
        found = library.ddpm_launch(name.encode(), *grid, threads, pointers)
        assert found, f"no kernel {name}"
