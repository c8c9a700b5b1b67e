"""Networks and bundles that export in seconds, made once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tiny_export import TINY, bundle_of, redrawn_network, save

import ddpm_export.pipeline
from ddpm_export.__main__ import main
from ddpm_export.onnx_graph import onnx_from_network
from ddpm_runtime.bundle import Bundle
from ddpm_train.unet import UNet


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def network() -> UNet:
    """A class-conditional U-Net with no layer left at zero. Do not change it: copy it."""
    return redrawn_network(TINY)


@pytest.fixture(scope="session")
def network_bytes(network: UNet) -> bytes:
    return onnx_from_network(network, (1, 8, 8), num_classes=3)


@pytest.fixture
def bundle(network_bytes: bytes) -> Bundle:
    return bundle_of(network_bytes)


@pytest.fixture
def checkpoint_path(network: UNet, tmp_path: Path) -> Path:
    return save(network, tmp_path / "garments" / "model.pt")


@pytest.fixture
def command(monkeypatch, capsys, network_bytes):
    """Run ddpm-export in this process; the ONNX bytes come from the fixture."""
    monkeypatch.setattr(ddpm_export.pipeline, "onnx_from_network", lambda *_, **__: network_bytes)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ddpm-export", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return run
