"""Build the cubins that ship with the package.

    python -m ddpm_runtime.cuda.build_kernels            every architecture
    python -m ddpm_runtime.cuda.build_kernels --sm 103   one more, beside those that are there

Needs cuda-bindings and nvidia-cuda-nvrtc, and no GPU. The same compiler gives the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..atomic import atomic_file
from ..errors import BackendError, DDPMError
from .compiler import MODULES, OPTIONS, compile_module, compiler_name, source_sha256
from .kernels import CUBINS

__all__ = ["ARCHITECTURES", "build", "register_limit"]

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)


def register_limit(sm: int) -> int:
    """Registers a thread may take without idling the multiprocessor; see portable_math.cuh."""
    return 48 if sm >= 80 else 64


def build(architectures: Sequence[int] = ARCHITECTURES, directory: Path = CUBINS) -> dict[str, Any]:
    """Compile, check and write every module for every architecture.

    Returns:
        The index that was written as ``kernels.json``.

    Raises:
        BackendUnavailableError: NVRTC is not installed.
        BackendError: it refuses; or a kernel spills registers, or takes too many.
    """
    images, cubins = {}, []
    for sm in architectures:
        for module in MODULES:
            compiled = compile_module(module, sm)
            worst = max(compiled.registers.values())
            if worst > register_limit(sm) or any(compiled.spill_bytes.values()):
                raise BackendError(
                    f"{module} for sm_{sm} takes {worst} registers (limit {register_limit(sm)}), "
                    f"spills {compiled.spill_bytes}. Make the kernel hold less at once."
                )
            name = f"{module}.sm_{sm}.cubin"
            images[name] = compiled.image
            cubins.append(
                {
                    "file": name,
                    "module": module,
                    "sm": sm,
                    "sha256": hashlib.sha256(compiled.image).hexdigest(),
                    "size_bytes": len(compiled.image),
                    "registers": compiled.registers,
                }
            )
    index = {
        "source_sha256": source_sha256(),
        "compiler": compiler_name(),
        "options": list(OPTIONS),
        "cubins": cubins,
    }
    directory.mkdir(exist_ok=True)
    for name, image in images.items():  # only now that every one of them is good
        with atomic_file(directory / name) as file:
            file.write(image)
    with atomic_file(directory / "kernels.json") as file:
        file.write(json.dumps(index, indent=1).encode() + b"\n")
    return index


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m ddpm_runtime.cuda.build_kernels")
    parser.add_argument(
        "--sm", type=int, action="append", default=[], help="another architecture, such as 103"
    )
    asked = parser.parse_args(arguments)
    try:
        index = build(sorted({*ARCHITECTURES, *asked.sm}))
    except DDPMError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    for cubin in index["cubins"]:
        registers = ", ".join(f"{name} {count}" for name, count in cubin["registers"].items())
        sys.stdout.write(f"{cubin['file']}  {cubin['size_bytes']} bytes  registers: {registers}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
