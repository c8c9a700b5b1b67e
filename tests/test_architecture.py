"""Who may know whom, and what importing the runtime costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {
    "ddpm_runtime": ROOT / "runtime" / "ddpm_runtime",
    "ddpm_train": ROOT / "train" / "ddpm_train",
    "ddpm_export": ROOT / "export" / "ddpm_export",
    "ddpm_bench": ROOT / "benchmarks" / "ddpm_bench",
}
MAY_IMPORT = {
    "ddpm_runtime": set(),
    "ddpm_train": {"ddpm_runtime"},
    "ddpm_export": {"ddpm_runtime", "ddpm_train"},
    "ddpm_bench": {"ddpm_runtime", "ddpm_train", "ddpm_export"},
}
HEAVY = ("torch", "onnx", "onnxruntime", "PIL", "tensorrt", "tensorrt_rtx", "cuda", "openvino")
COMMAND_MODULES = {"click", "tqdm"}  # only ddpm-run's own files need these


def imported_modules(file: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(file.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_imports_between_rooms_point_one_way(room):
    files = sorted(ROOMS[room].rglob("*.py"))
    assert files
    for file in files:
        others = imported_modules(file) & set(ROOMS) - {room}
        assert others <= MAY_IMPORT[room], f"{file} imports {others - MAY_IMPORT[room]}"


def test_the_runtime_never_imports_torch_or_onnx_anywhere():
    for file in ROOMS["ddpm_runtime"].rglob("*.py"):
        assert not imported_modules(file) & {"torch", "onnx"}, file


def test_the_runtime_imports_heavy_libraries_only_inside_functions():
    for file in ROOMS["ddpm_runtime"].rglob("*.py"):
        assert not imported_modules(file, top_level_only=True) & set(HEAVY), file


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120
    )


def test_importing_the_runtime_loads_numpy_and_little_else():
    code = (
        "import sys; before = set(sys.modules); import ddpm_runtime; "
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    loaded = set(run_python(code).stdout.split())
    assert "ddpm_runtime" in loaded
    assert not loaded & {*HEAVY, *COMMAND_MODULES}
    third_party = {m for m in loaded if m not in sys.stdlib_module_names and m[0] != "_"}
    # msgspec takes typing_extensions when something else has installed it
    assert third_party - {"typing_extensions"} == {"ddpm_runtime", "numpy", "msgspec"}


def test_the_runtime_works_where_every_heavy_library_is_blocked(tmp_path):
    blocked = [*HEAVY, *COMMAND_MODULES, "ddpm_train", "ddpm_export", "ddpm_bench"]
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Block())
import numpy as np
from ddpm_runtime.backends import FunctionBackend
from ddpm_runtime.lanes import HostLanes
from ddpm_runtime.samplers import build_program
from ddpm_runtime.schedule import make_schedule
program = build_program("ddim", schedule=make_schedule(), prediction_type="epsilon",
                        num_inference_steps=5)
lanes = HostLanes(FunctionBackend(lambda x, t, y: 0.1 * x, (1, 4, 4)), 2)
lanes.start(program, seed=0, index=0)
while not (finished := lanes.advance()): pass
print(finished[0].image.shape)
"""
    done = run_python(code)
    assert done.stdout.strip() == "(1, 4, 4)", done.stderr


@pytest.mark.parametrize(
    ("module", "library", "extra"),
    [
        ("ddpm_train", "torch", "train"),
        ("ddpm_export", "torch", "export"),
        ("ddpm_bench", "onnxruntime", "bench"),
    ],
)
def test_a_command_without_its_extra_prints_the_pip_line_and_exits_1(module, library, extra):
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {library!r}:
            raise ImportError(f"No module named {{name}}", name=name)
sys.meta_path.insert(0, Block())
from {module}.__main__ import main
main()
"""
    done = run_python(code, "--help")
    assert done.returncode == 1
    assert f"pip install 'ddpm-engine[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_engine_without_onnxruntime_prints_the_pip_line_and_exits_1(tiny_engine_path):
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("onnxruntime", "openvino"):
            raise ImportError(f"No module named {name}", name=name)
sys.meta_path.insert(0, Block())
from ddpm_runtime.__main__ import main
main()
"""
    done = run_python(code, "--engine", str(tiny_engine_path))
    assert done.returncode == 1
    assert "pip install 'ddpm-engine[cpu]'" in done.stderr
    assert "Traceback" not in done.stderr
