"""The machine code that ships: made from these sources, small, and chosen or refused rightly."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
from helpers_cuda.simulator import Code, SimulatedDriver

from ddpm_runtime.cuda import build_kernels, open_device
from ddpm_runtime.cuda import kernels as kernels_module
from ddpm_runtime.cuda.compiler import (
    MODULES,
    OPTIONS,
    compile_module,
    compiler_name,
    source_sha256,
)
from ddpm_runtime.cuda.kernels import CUBINS, find_image, load_kernels, select_cubin
from ddpm_runtime.errors import BackendError, BackendUnavailableError

INDEX = json.loads((CUBINS / "kernels.json").read_bytes())
REBUILD = "run: python -m ddpm_runtime.cuda.build_kernels"


def test_every_architecture_and_module_ships():
    shipped = {(entry["sm"], entry["module"]) for entry in INDEX["cubins"]}
    assert shipped == {(sm, module) for sm in build_kernels.ARCHITECTURES for module in MODULES}
    files = {path.name for path in CUBINS.iterdir()}
    assert files == {"kernels.json", *(entry["file"] for entry in INDEX["cubins"])}


def test_the_index_names_these_sources_and_these_files():
    assert INDEX["source_sha256"] == source_sha256(), REBUILD
    assert INDEX["options"] == list(OPTIONS), REBUILD
    for entry in INDEX["cubins"]:
        code = (CUBINS / entry["file"]).read_bytes()
        assert len(code) == entry["size_bytes"] < 80_000
        assert hashlib.sha256(code).hexdigest() == entry["sha256"]


@pytest.mark.parametrize("sm", build_kernels.ARCHITECTURES)
@pytest.mark.parametrize("module", MODULES)
def test_the_shipped_code_is_what_the_source_gives(sm, module):
    compiled = compile_module(module, sm)
    entry = next(e for e in INDEX["cubins"] if (e["sm"], e["module"]) == (sm, module))
    # Turing's multiprocessor is full at 64 registers a thread, the others' at 48 or fewer
    assert max(compiled.registers.values()) <= (48 if sm >= 80 else 64)
    assert set(compiled.spill_bytes.values()) == {0}
    if compiler_name() == INDEX["compiler"]:
        assert compiled.registers == entry["registers"]
        assert hashlib.sha256(compiled.image).hexdigest() == entry["sha256"], REBUILD


def test_a_cubin_runs_on_its_major_version_from_its_minor_on():
    shipped = build_kernels.ARCHITECTURES
    expected = {75: 75, 80: 80, 86: 86, 87: 86, 89: 89, 90: 90, 100: 100, 103: 100, 121: 120}
    assert {sm: select_cubin(sm, shipped) for sm in expected} == expected
    for sm in (70, 72, 60, 110, 130):
        assert select_cubin(sm, shipped) is None


def test_the_shipped_code_is_taken_without_a_compiler(monkeypatch):
    monkeypatch.setattr(kernels_module, "compile_module", forbidden)
    assert find_image("step", 90).origin == "sm_90, shipped"
    assert find_image("loop", 121).origin == "sm_120, shipped"


def test_an_architecture_without_a_cubin_is_compiled_for_and_says_so():
    image = find_image("step", 110)
    assert image.code.startswith(b"\x7fELF")
    assert image.origin == (
        f"sm_110, compiled by {compiler_name()}: "
        "cubins ship for sm_75, sm_80, sm_86, sm_89, sm_90, sm_100, sm_120"
    )


def test_an_architecture_nobody_knows_is_refused_with_both_reasons():
    with pytest.raises(BackendError, match=r"no kernels for sm_70: cubins ship for .* not 70"):
        find_image("step", 70)


def test_without_a_compiler_the_refusal_has_the_pip_line(monkeypatch):
    monkeypatch.setattr(kernels_module, "compile_module", forbidden)
    with pytest.raises(BackendError, match="pip install nvidia-cuda-nvrtc"):
        find_image("step", 88_0)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("alter", r"step\.sm_90\.cubin is not the file that was built"),
        ("remove", r"step\.sm_90\.cubin is missing"),
        ("stale", "made from other sources"),
        ("empty", "ships no cubins"),
    ],
)
def test_damaged_or_stale_cubins_are_never_loaded(tmp_path, damage, reason):
    directory = tmp_path / "cubins"
    if damage != "empty":
        shutil.copytree(CUBINS, directory)
    cubin = directory / "step.sm_90.cubin"
    if damage == "alter":
        cubin.write_bytes(cubin.read_bytes()[:-1] + b"?")
    elif damage == "remove":
        cubin.unlink()
    elif damage == "stale":
        (directory / "kernels.json").write_text(json.dumps({**INDEX, "source_sha256": "old"}))
    image = find_image("step", 90, directory=directory)
    assert image.origin.startswith("sm_90, compiled by NVRTC")
    assert reason.replace("\\", "") in image.origin


def test_a_cubin_the_driver_refuses_is_compiled_here_instead(host_kernels):
    driver = SimulatedDriver(host_kernels)
    driver.fail("cuModuleLoadData", Code.CUDA_ERROR_NO_BINARY_FOR_GPU)
    with open_device(driver=driver.started()) as device:
        origin = load_kernels(device, image_size=8).origin
        assert origin.startswith("sm_90, compiled by NVRTC")
        assert "the shipped code was refused: cannot load machine code on Simulated GPU" in origin
        driver.fail("cuModuleLoadData", Code.CUDA_ERROR_NO_BINARY_FOR_GPU, times=2)
        with pytest.raises(BackendError, match="CUDA_ERROR_NO_BINARY_FOR_GPU"):
            load_kernels(device, image_size=8)


def test_build_kernels_writes_the_same_bytes_again(tmp_path):
    index = build_kernels.build([90], tmp_path)
    if index["compiler"] == INDEX["compiler"]:
        for entry in index["cubins"]:
            assert (tmp_path / entry["file"]).read_bytes() == (CUBINS / entry["file"]).read_bytes()
    assert json.loads((tmp_path / "kernels.json").read_bytes()) == index


def test_build_kernels_refuses_an_unknown_architecture_with_a_message(capsys):
    assert build_kernels.main(["--sm", "12345"]) == 1
    assert "knows the architectures" in capsys.readouterr().err


def forbidden(module: str, sm: int):
    raise BackendUnavailableError("NVRTC is needed; install it with: pip install nvidia-cuda-nvrtc")


def test_compiling_leaves_every_single_byte_what_it_was():
    """An empty log is one byte long; written into Python's shared b' ' it changed it everywhere."""
    for module in MODULES:
        compile_module(module, 90, target="ptx")
    assert [bytes([i])[0] for i in range(256)] == list(range(256))
