"""Write tensorrt_api.json: what four versions of TensorRT's bindings offer, as far as we ask.

    python tests/plans/make_api_surface.py

Downloads the bindings' wheels for this Python (a megabyte each, none of their libraries), lets
empty stubs stand in for libnvinfer and its friends (gcc), and asks every class for its members and
every method for its arguments. TensorRT-RTX is taken as it is installed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSIONS = {"10.13": "10", "10.16": "10", "11.4": "11"}
"""Bindings to the number in the names of their libraries."""

CLASSES = [
    "Builder",
    "BuilderFlag",
    "CudaGraphStrategy",
    "ComputeCapability",
    "DataType",
    "DynamicShapesKernelSpecializationStrategy",
    "ExecutionContextAllocationStrategy",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "IHostMemory",
    "ILogger",
    "INetworkDefinition",
    "IOptimizationProfile",
    "IProgressMonitor",
    "IRuntimeCache",
    "IRuntimeConfig",
    "ITensor",
    "ITimingCache",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "OnnxParser",
    "ParserError",
    "Runtime",
    "TensorIOMode",
    "TensorLocation",
]

STUB_SYMBOLS = [
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getInferLibVersion",
    "getNvOnnxParserVersion",
    "getPluginCreators",
    "getPluginRegistry",
    "initLibNvInferPlugins",
]


def surface(module_name: str) -> dict[str, object]:
    """Version and classes of an importable module."""
    module = __import__(module_name)
    classes = {name: members(getattr(module, name, None)) for name in CLASSES}
    return {"version": module.__version__, "classes": classes}


def members(cls: type | None) -> dict[str, object] | None:
    """Each public member: "property", an enumerator's number, or how many arguments it takes."""
    if cls is None:
        return None
    found: dict[str, object] = {}
    for name in dir(cls):
        if name.startswith("_"):
            continue
        member = getattr(cls, name)
        if isinstance(member, cls) or name.isupper():
            found[name] = int(member)
        elif callable(member):
            found[name] = arities(name, member.__doc__ or "")
        else:
            found[name] = "property"
    return found


def arities(name: str, documentation: str) -> list[list[int]]:
    """[fewest, most] arguments of every overload, without self, from pybind11's signatures."""
    found = []
    pattern = rf"^\s*(?:\d+\. )?{re.escape(name)}\((.*)\)(?: -> .*)?$"
    for signature in re.findall(pattern, documentation, re.MULTILINE):
        if "*args" in signature:
            continue
        arguments = [a for a in split_arguments(signature) if not a.startswith("self")]
        required = [a for a in arguments if " = " not in a]
        found.append([len(required), len(arguments)])
    return found


def split_arguments(signature: str) -> list[str]:
    """Arguments between commas that no bracket encloses."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(signature):
        depth += (character in "([{<") - (character in ")]}>")
        if character == "," and depth == 0:
            parts.append(signature[start:position].strip())
            start = position + 1
    return [part for part in (*parts, signature[start:].strip()) if part]


def bindings(version: str, library_number: str, folder: Path) -> dict[str, object]:
    """The surface of one version's bindings, loaded over stubs in a process of its own."""
    wheels, site, stubs = (folder / version / part for part in ("wheels", "site", "stubs"))
    stubs.mkdir(parents=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels),
         f"tensorrt-cu13-bindings=={version}.*"],
        check=True,
    )  # fmt: skip
    (wheel,) = wheels.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    source = stubs / "stub.c"
    source.write_text("".join(f"void* {symbol}(void) {{ return 0; }}\n" for symbol in STUB_SYMBOLS))
    for library in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        name = f"lib{library}.so.{library_number}"
        subprocess.run(
            ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", name, source.name],
            cwd=stubs,
            check=True,
        )
    environment = {**os.environ, "LD_LIBRARY_PATH": str(stubs), "PYTHONPATH": str(site)}
    answer = subprocess.run(
        [sys.executable, __file__, "tensorrt_bindings"],
        env=environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return json.loads(answer.stdout)


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(surface(sys.argv[1])))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = {
            version: bindings(version, number, Path(folder)) for version, number in VERSIONS.items()
        }
    found["rtx"] = surface("tensorrt_rtx")
    lines = [
        f'"{version}": {{"version": "{one["version"]}", "classes": {{\n'
        + ",\n".join(f' "{name}": {json.dumps(one["classes"][name])}' for name in CLASSES)
        + "\n}}"
        for version, one in found.items()
    ]
    Path(__file__).with_name("tensorrt_api.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
