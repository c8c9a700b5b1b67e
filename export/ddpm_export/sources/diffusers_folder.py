"""A folder saved by diffusers: a DDPM pipeline, or a UNet2DModel with a scheduler_config.json.

    pipeline/  model_index.json, unet/{config.json, *.safetensors}, scheduler/scheduler_config.json
    model/     config.json, *.safetensors, scheduler_config.json

Only local folders, only safetensors, and only this architecture: nothing in the folder chooses what
code runs. The class that carries out the network comes from the installed diffusers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddpm_runtime.bundle import Image
from ddpm_runtime.errors import CheckpointError

from .base import Source, TrainedNetwork

__all__ = ["DIFFUSERS_FOLDER"]

_ARCHITECTURE = "UNet2DModel"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_MAX_CONFIG_BYTES = 1 << 20


def _recognises(path: Path) -> bool:
    return (path / "model_index.json").is_file() or (path / "config.json").is_file()


def _load(path: Path) -> TrainedNetwork:
    """Read the folder.

    Raises:
        CheckpointError: another architecture, a missing or damaged file, weights that are not
            safetensors, diffusers not installed, or a kind of network this project cannot sample.
    """
    is_pipeline = (path / "model_index.json").is_file()
    folder = path / "unet" if is_pipeline else path
    config = _read_json(folder / "config.json")
    scheduler = _read_json((path / "scheduler" if is_pipeline else path) / "scheduler_config.json")
    if config.get("_class_name") != _ARCHITECTURE:
        raise CheckpointError(
            f"{str(folder)!r} holds a {config.get('_class_name')!r}; of diffusers' networks only "
            f"{_ARCHITECTURE} can be exported."
        )
    learned_variance = str(scheduler.get("variance_type", "")).startswith("learned")
    try:
        return TrainedNetwork(
            network=_OneTensorOut(_open(folder)).float().eval(),
            image=_image(config, learned_variance=learned_variance),
            schedule_spec=_schedule_spec(scheduler),
            prediction_type=str(scheduler.get("prediction_type", "epsilon")),
            learned_variance=learned_variance,
            clip_denoised=_clips(scheduler),
            provenance={
                "source": f"diffusers {config.get('_diffusers_version', 'of unknown version')}",
                "checkpoint_sha256": hashlib.sha256((folder / _WEIGHTS).read_bytes()).hexdigest(),
            },
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{str(path)!r} is incomplete or malformed ({type(error).__name__}: {error}). "
            "Save it again with save_pretrained(..., safe_serialization=True)."
        ) from error


class _OneTensorOut(nn.Module):
    """The network as this project calls it: tensors in, one tensor out."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        prediction: Tensor = self.network(sample, timestep, return_dict=False)[0]
        return prediction


def _open(folder: Path) -> nn.Module:
    """Build the network with its weights, reading no pickle."""
    if not (folder / _WEIGHTS).is_file():
        raise CheckpointError(
            f"{str(folder)!r} has no {_WEIGHTS}. Weights in other forms are not read: save them "
            "with save_pretrained(..., safe_serialization=True)."
        )
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise CheckpointError(
            "diffusers is needed to read its folders and is not installed. "
            "Install it with: pip install diffusers"
        ) from error
    architecture: Any = UNet2DModel
    try:
        network: nn.Module = architecture.from_pretrained(
            str(folder),
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            torch_dtype=torch.float32,
        )
    except Exception as error:  # diffusers raises many unrelated types
        first = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"diffusers cannot read {str(folder)!r} ({type(error).__name__}: {first})."
        ) from error
    return network


def _image(config: Mapping[str, Any], *, learned_variance: bool) -> Image:
    size, channels = config["sample_size"], int(config["in_channels"])
    height, width = size if isinstance(size, list) else (size, size)
    if config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None:
        raise CheckpointError(
            "class-conditional networks of diffusers cannot be exported: nothing says which of "
            'their labels means "no class".'
        )
    expected = channels * (2 if learned_variance else 1)
    if config["out_channels"] != expected:
        raise CheckpointError(
            f"the network answers with {config['out_channels']} channels where an image of "
            f"{channels} needs {expected}."
        )
    return Image(height=int(height), width=int(width), channels=channels)


def _clips(scheduler: Mapping[str, Any]) -> bool:
    clips = bool(scheduler.get("clip_sample", True))
    if clips and scheduler.get("clip_sample_range", 1.0) != 1.0:
        raise CheckpointError(
            f"clip_sample_range is {scheduler['clip_sample_range']}; only 1.0 can be exported."
        )
    return clips


def _schedule_spec(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """What ``make_schedule`` takes, for every schedule diffusers knows.

    Raises:
        CheckpointError: a scheduler that is not one of noise levels √ᾱ_t.
    """
    steps = int(scheduler["num_train_timesteps"])
    kind = "given" if scheduler.get("trained_betas") else scheduler.get("beta_schedule")
    low, high = float(scheduler["beta_start"]), float(scheduler["beta_end"])
    spec: dict[str, Any] = {"num_train_timesteps": steps}
    if kind in ("linear", "scaled_linear"):
        spec |= {"name": kind, "beta_start": low, "beta_end": high}
    elif kind == "squaredcos_cap_v2":
        spec |= {"name": "cosine"}
    elif kind == "sigmoid":
        logistic = 1.0 / (1.0 + np.exp(-np.linspace(-6.0, 6.0, steps)))
        spec |= {"name": "custom", "betas": (logistic * (high - low) + low).tolist()}
    elif kind == "given":
        spec |= {"name": "custom", "betas": [float(beta) for beta in scheduler["trained_betas"]]}
    else:
        raise CheckpointError(
            f"scheduler {scheduler.get('_class_name')!r} with beta_schedule {kind!r} has no noise "
            "schedule known here."
        )
    if scheduler.get("rescale_betas_zero_snr"):
        raise CheckpointError(
            "a schedule rescaled to zero terminal SNR cannot be exported from diffusers yet."
        )
    return spec


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise CheckpointError(f"{str(path)!r} is too large for a configuration.")
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read ({error.strerror}); a diffusers folder needs it."
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{str(path)!r} is not JSON ({error}).") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{str(path)!r} is not a JSON object.")
    return values


DIFFUSERS_FOLDER = Source(
    what="a folder saved by diffusers' DDPMPipeline or UNet2DModel, with safetensors",
    recognises=_recognises,
    load=_load,
)
