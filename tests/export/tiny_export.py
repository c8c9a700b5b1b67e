"""A class-conditional 8×8 U-Net, its checkpoint, and a bundle around ONNX bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddpm_runtime.bundle import Bundle, Defaults, Image, Manifest, Network
from ddpm_runtime.schedule import make_schedule
from ddpm_train.checkpoint import save_checkpoint
from ddpm_train.unet import UNet, UNetConfig

TINY = UNetConfig(
    image_size=8,
    image_channels=1,
    channels=8,
    channel_multipliers=(1, 2),
    residual_blocks=1,
    attention_resolutions=(4,),
    dropout=0.3,
    num_classes=3,
    norm_groups=4,
)
SPEC = {"name": "linear", "num_train_timesteps": 200}


def redrawn_network(config: UNetConfig, seed: int = 0) -> UNet:
    """In eval mode; layers that start at zero are drawn like the others, or they would hide all."""
    torch.manual_seed(seed)
    network = UNet(config).eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.any():
            module.reset_parameters()
    return network


def save(network: UNet, path: Path, **changes: Any) -> Path:
    """Write the network as a checkpoint."""
    path.parent.mkdir(exist_ok=True)
    settings = {"schedule_spec": SPEC, "prediction_type": "epsilon", "step": 7}
    save_checkpoint(path, network.config, network.state_dict(), **{**settings, **changes})
    return path


def bundle_of(network_bytes: bytes, *, num_classes: int = 3, **defaults: Any) -> Bundle:
    """The bundle in memory that a gate is shown."""
    manifest = Manifest(
        name="tiny",
        image=Image(height=8, width=8, channels=1),
        network=Network(prediction_type="epsilon", num_classes=num_classes, opset=18),
        schedule=SPEC,
        defaults=Defaults(**{"guidance_scale": 2.0, **defaults}),
    )
    return Bundle(manifest=manifest, network_bytes=network_bytes, schedule=make_schedule(**SPEC))
