"""Where to train, and in which precision."""

from __future__ import annotations

from typing import Any

import torch

from ddpm_runtime.errors import ConfigurationError

from .config import RunConfig

__all__ = ["choose_device", "device_type", "uses_bf16"]


def device_type(config: RunConfig) -> str:
    """The kind of device: "cpu" or "cuda".

    Raises:
        ConfigurationError: CUDA was asked for and is not there.
    """
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(
            "device 'cuda' was asked for, and torch finds no CUDA device here. Use --device cpu, "
            "or install a CUDA build of torch and check nvidia-smi."
        )
    return config.device


def choose_device(config: RunConfig, local_rank: int = 0) -> torch.device:
    """The device of this process."""
    if device_type(config) == "cpu":
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigurationError(
            f"process {local_rank} of this machine has no GPU: there are "
            f"{torch.cuda.device_count()}. Start as many processes as GPUs."
        )
    return torch.device("cuda", local_rank)


def uses_bf16(config: RunConfig, device: torch.device) -> bool:
    """Whether to autocast to bfloat16; "auto" does so where the hardware multiplies it natively."""
    if config.precision != "auto":
        return config.precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # torch says what the CPU can do from 2.11 on; before, "auto" stays with fp32
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(bool(capabilities.get(name)) for name in ("amx_bf16", "avx512_bf16", "bf16"))
