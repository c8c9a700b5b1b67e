"""Fixtures of the CUDA tests: the kernels built by g++, once a session."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers_cuda.host_build import EXACT, HostKernels, build


@pytest.fixture(scope="session")
def host_libraries(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return build(tmp_path_factory.mktemp("kernels") / "exact", EXACT)


@pytest.fixture(scope="session")
def host_kernels(host_libraries: list[Path]) -> HostKernels:
    """Device code on the CPU, every operation rounded on its own."""
    return HostKernels(host_libraries)
