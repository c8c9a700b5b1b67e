"""The networks that peers are timed on: our U-Net, seeded, and diffusers' of equal size.

Speed does not depend on what the weights are, so nothing is downloaded; weights that are zero at
initialisation are filled, so that no library can skip them.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from ddpm_runtime.bundle import Defaults, Image, Manifest, Network, write_bundle
from ddpm_train.unet import UNet, UNetConfig

__all__ = ["NETWORKS", "diffusers_network", "make_bundle", "make_network"]

NETWORKS = {
    "fashion-mnist": UNetConfig(
        image_size=28,
        image_channels=1,
        channels=32,
        channel_multipliers=(1, 2, 3),
        residual_blocks=1,
        attention_resolutions=(7,),
        num_classes=10,
        norm_groups=8,
        dropout=0.0,
    ),
    "cifar-10": UNetConfig(image_size=32, image_channels=3),
}


def make_network(config: UNetConfig) -> UNet:
    """The network in eval mode, weights drawn from seed 0."""
    torch.manual_seed(0)
    network = UNet(config).eval()
    with torch.no_grad():
        for weight in network.parameters():
            if float(weight.abs().max()) < 1e-4:
                weight.normal_(std=0.02)
            weight.requires_grad_(False)
    return network


def make_bundle(network: UNet, config: UNetConfig, name: str) -> Path:
    """Export the network to a temporary bundle; the caller removes its parent folder."""
    from ddpm_export.onnx_graph import onnx_from_network

    image = (config.image_channels, config.image_size, config.image_size)
    manifest = Manifest(
        name=name,
        image=Image(
            height=config.image_size, width=config.image_size, channels=config.image_channels
        ),
        network=Network(prediction_type="epsilon", num_classes=config.num_classes, opset=18),
        schedule={"name": "linear", "num_train_timesteps": 1000},
        defaults=Defaults(),
    )
    path = Path(tempfile.mkdtemp(prefix="ddpm-bench-")) / f"{name}.engine"
    write_bundle(path, manifest, onnx_from_network(network, image, num_classes=config.num_classes))
    return path


def diffusers_network(config: UNetConfig) -> Any:
    """diffusers' UNet2DModel with the same widths, depths and attention; weights from seed 0."""
    import diffusers

    make: Any = diffusers.UNet2DModel
    torch.manual_seed(0)
    sizes = [config.image_size >> level for level in range(len(config.channel_multipliers))]
    attends = [size in config.attention_resolutions for size in sizes]
    network: Any = make(
        sample_size=config.image_size,
        in_channels=config.image_channels,
        out_channels=config.image_channels,
        block_out_channels=[config.channels * one for one in config.channel_multipliers],
        layers_per_block=config.residual_blocks,
        down_block_types=["AttnDownBlock2D" if one else "DownBlock2D" for one in attends],
        up_block_types=["AttnUpBlock2D" if one else "UpBlock2D" for one in reversed(attends)],
        norm_num_groups=config.norm_groups,
        attention_head_dim=None,
        num_class_embeds=config.num_classes + 1 if config.num_classes else None,
    )
    return network.eval().requires_grad_(False)
