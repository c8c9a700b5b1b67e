"""Checkpoints: what a training run hands to export, and what it needs to continue itself.

    model.pt  (or .safetensors)   the averaged weights and everything needed to use them
    resume.pt                     everything needed to continue the run, bit for bit

Both are plain dictionaries of tensors and JSON values. They are written whole or not at all, and
read with ``weights_only=True``, always: a pickle can run code, and no fallback here lets it.
"""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_runtime.atomic import atomic_file
from ddpm_runtime.errors import CheckpointError, ConfigurationError

from .unet import UNet, UNetConfig

__all__ = [
    "Checkpoint",
    "load_checkpoint",
    "network_from_checkpoint",
    "read_state",
    "save_checkpoint",
    "write_state",
]

FORMAT = "ddpm-engine checkpoint"
RESUME_FORMAT = "ddpm-engine resume state"
FORMAT_VERSION = 1
METADATA_KEY = "ddpm-engine"


@dataclass(frozen=True, eq=False, kw_only=True)
class Checkpoint:
    """A trained network, ready to be exported or sampled.

    Args:
        network_config: the shape of the network.
        state_dict: its weights: the moving average, float32, on the CPU.
        schedule_spec: ``make_schedule(**schedule_spec)`` gives the training schedule.
        prediction_type: what the network predicts: one of ``config.PREDICTION_TYPES``.
        learned_variance: whether half of the output channels are a variance.
        image_size: height and width in pixels.
        image_channels: 1 for grey, 3 for colour; values lie in ``value_range``.
        value_range: what pixel values 0 and 255 became.
        num_classes: 0 for an unconditional network.
        class_names: a name for every class.
        step: optimiser steps taken.
        provenance: where it came from: versions, seed, recipe, hash of the data; JSON values.
    """

    network_config: UNetConfig
    state_dict: dict[str, Tensor]
    schedule_spec: dict[str, Any]
    prediction_type: str
    learned_variance: bool = False
    image_size: int
    image_channels: int
    value_range: tuple[float, float] = (-1.0, 1.0)
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    step: int = 0
    provenance: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(
    path: str | Path,
    network_config: UNetConfig,
    state_dict: Mapping[str, Tensor],
    *,
    schedule_spec: Mapping[str, Any],
    prediction_type: str,
    learned_variance: bool = False,
    class_names: tuple[str, ...] = (),
    step: int = 0,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write an inference checkpoint: ``.safetensors`` by that suffix, else a ``.pt``.

    Args:
        path: where; the file is the old one or the new one, whatever happens.
        network_config: the shape of the network.
        state_dict: its weights, normally the moving average.
        schedule_spec: ``NoiseSchedule.spec`` of the training schedule.
        prediction_type: what the network predicts.
        learned_variance: whether half of the output channels are a variance.
        class_names: a name for every class.
        step: optimiser steps taken.
        provenance: JSON values; no paths of this machine.

    Raises:
        CheckpointError: a weight is NaN or infinite.
        OSError: the place is missing, full or not writable.
    """
    weights = {name: value.detach().cpu().contiguous() for name, value in state_dict.items()}
    _check_finite(weights, Path(path))
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "network": network_config.to_dict(),
        "diffusion": {
            "schedule": dict(schedule_spec),
            "prediction_type": prediction_type,
            "learned_variance": learned_variance,
        },
        "image": {
            "size": network_config.image_size,
            "channels": network_config.image_channels,
            "value_range": [-1.0, 1.0],
        },
        "class_names": list(class_names),
        "step": step,
        "provenance": dict(provenance or {}),
    }
    header = json.loads(json.dumps(header))  # tuples become lists, and only JSON values pass
    if Path(path).suffix == ".safetensors":
        _write_safetensors(Path(path), header, weights)
    else:
        write_state(path, {**header, "state_dict": weights})


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read an inference checkpoint, running no code that it may hold.

    Raises:
        CheckpointError: not there, not a checkpoint, damaged, from a newer format, a pickle that
            wants to run code, or weights that are NaN or infinite.
    """
    source = Path(path)
    if source.suffix == ".safetensors":
        values = _read_safetensors(source)
    else:
        values = read_state(source, FORMAT)
    try:
        checkpoint = _checkpoint_from_values(values)
    except (KeyError, TypeError, ValueError, ConfigurationError) as error:
        raise CheckpointError(
            f"{str(source)!r} is incomplete or malformed ({type(error).__name__}: {error}). "
            "Write it again with ddpm-train."
        ) from error
    _check_finite(checkpoint.state_dict, source)
    return checkpoint


def network_from_checkpoint(checkpoint: Checkpoint) -> UNet:
    """Build the network of a checkpoint, with its weights, in eval mode, on the CPU.

    Raises:
        CheckpointError: the weights are not those of the network described.
    """
    network = UNet(checkpoint.network_config)
    try:
        network.load_state_dict(checkpoint.state_dict)
    except RuntimeError as error:
        raise CheckpointError(
            f"the weights do not fit the network the checkpoint describes: {error}"
        ) from error
    return network.eval()


def write_state(path: str | Path, values: Mapping[str, Any]) -> None:
    """Write a dictionary of tensors and JSON values, whole or not at all.

    Raises:
        OSError: the place is missing, full or not writable.
    """
    with atomic_file(path) as file:
        torch.save(dict(values), file)


def read_state(path: str | Path, expected_format: str) -> dict[str, Any]:
    """Read what :func:`write_state` wrote; tensors arrive on the CPU.

    Args:
        path: the file.
        expected_format: what its "format" entry must say.

    Raises:
        CheckpointError: not there, damaged, of another kind, or a pickle that wants to run code.
    """
    name = str(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of foreign pickles; they raise below
            values = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"no checkpoint at {name!r}: there is no such file.") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(name, str(error))) from error
    except Exception as error:  # torch has no one type for a damaged file
        raise CheckpointError(
            f"{name!r} is not a checkpoint, or is damaged ({type(error).__name__}: "
            f"{_first_line(error)}). Give a model.pt written by ddpm-train."
        ) from error
    found = values.get("format") if isinstance(values, dict) else None
    if found != expected_format:
        described = f"a {type(values).__name__}" if found is None else repr(found)
        raise CheckpointError(
            f"{name!r} holds {described}, not a {expected_format!r}. Give the file that ddpm-train "
            "wrote as model.pt."
        )
    _check_version(values, name)
    return dict(values)


def _refusal(name: str, reason: str) -> str:
    if "Unsupported" in reason or "Trying to" in reason or "not an allowed" in reason:
        return (
            f"refused to load {name!r}: unpickling it asks to run code, beyond tensors and plain "
            f"values ({_first_line(reason)}). Nothing in it was run. Get the weights as "
            ".safetensors, or as a plain state dict, from someone you trust."
        )
    return f"{name!r} is not a checkpoint, or is damaged ({_first_line(reason)})."


def _check_version(values: Mapping[str, Any], name: str) -> None:
    version = values.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"{name!r} has format version {version!r}; this ddpm-engine reads up to "
            f"{FORMAT_VERSION}. Upgrade with: pip install -U 'ddpm-engine[train]'"
        )


def _checkpoint_from_values(values: Mapping[str, Any]) -> Checkpoint:
    network_config = UNetConfig(**values["network"])
    diffusion, image = values["diffusion"], values["image"]
    low, high = image["value_range"]
    return Checkpoint(
        network_config=network_config,
        state_dict=dict(values["state_dict"]),
        schedule_spec=dict(diffusion["schedule"]),
        prediction_type=str(diffusion["prediction_type"]),
        learned_variance=bool(diffusion["learned_variance"]),
        image_size=int(image["size"]),
        image_channels=int(image["channels"]),
        value_range=(float(low), float(high)),
        num_classes=network_config.num_classes,
        class_names=tuple(values["class_names"]),
        step=int(values["step"]),
        provenance=dict(values["provenance"]),
    )


def _check_finite(weights: Mapping[str, Tensor], path: Path) -> None:
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{str(path)!r}: {name!r} is not a tensor.")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            bad = int((~torch.isfinite(value)).sum())
            raise CheckpointError(
                f"{str(path)!r}: the weights {name!r} have {bad} NaN or infinite values of "
                f"{value.numel()}. The training diverged: use an earlier checkpoint, or train with "
                "a lower --learning-rate."
            )


def _write_safetensors(path: Path, header: dict[str, Any], weights: dict[str, Tensor]) -> None:
    from safetensors.torch import save

    content = save(weights, metadata={METADATA_KEY: json.dumps(header)})
    with atomic_file(path) as file:
        file.write(content)


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            metadata = (file.metadata() or {}).get(METADATA_KEY)
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise CheckpointError(f"no checkpoint at {str(path)!r}: there is no such file.") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{str(path)!r} is not a safetensors file, or is damaged ({error})."
        ) from error
    if metadata is None:
        raise CheckpointError(
            f"{str(path)!r} has weights but not the metadata {METADATA_KEY!r} that says what they "
            "are. Write it with ddpm_train.checkpoint.save_checkpoint."
        )
    try:
        values = json.loads(metadata)
    except ValueError as error:
        raise CheckpointError(f"{str(path)!r}: its metadata is not JSON ({error}).") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise CheckpointError(f"{str(path)!r}: its metadata does not describe a {FORMAT!r}.")
    _check_version(values, str(path))
    return {**values, "state_dict": weights}


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [""])[0]
