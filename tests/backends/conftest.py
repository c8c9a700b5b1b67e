"""A cache of compiled networks that dies with the tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("DDPM_ENGINE_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def unet_engine_path(tmp_path_factory):
    """A small real U-Net: convolutions, group norms, attention, class embedding."""
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    import torch

    from ddpm_export.onnx_graph import onnx_from_network
    from ddpm_runtime.bundle import Defaults, Image, Manifest, Network, write_bundle
    from ddpm_train.unet import UNet, UNetConfig

    torch.manual_seed(0)
    config = UNetConfig(
        image_size=14, image_channels=1, channels=16, channel_multipliers=(1, 2),
        residual_blocks=1, attention_resolutions=(7,), num_classes=3, norm_groups=8, dropout=0.0,
    )  # fmt: skip
    network = UNet(config).eval()
    with torch.no_grad():
        for weight in network.parameters():
            if float(weight.abs().max()) < 1e-4:
                weight.normal_(std=0.02)
    manifest = Manifest(
        name="unet", image=Image(height=14, width=14, channels=1),
        network=Network(prediction_type="epsilon", num_classes=3, opset=18),
        schedule={"name": "linear", "num_train_timesteps": 1000}, defaults=Defaults(steps=4),
    )  # fmt: skip
    path = tmp_path_factory.mktemp("unet") / "unet.engine"
    write_bundle(path, manifest, onnx_from_network(network, (1, 14, 14), num_classes=3))
    return path
