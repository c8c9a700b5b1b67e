"""From a checkpoint to a bundle that has proved itself: ``bundle_from_checkpoint``.

    read the checkpoint ─▶ write the ONNX bytes ─▶ compare them with PyTorch ─▶ write the bundle

Nothing is written before the gate has passed, and then everything in one step.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import onnx
import onnxruntime
import onnxscript
import torch

from ddpm_runtime._version import __version__
from ddpm_runtime.bundle import Bundle, Defaults, Manifest, Network, read_bundle, write_bundle
from ddpm_runtime.errors import (
    BundleError,
    CheckpointError,
    ConfigurationError,
    IntegrityError,
)
from ddpm_runtime.samplers import SAMPLERS, build_program, resolve_sampler
from ddpm_runtime.schedule import NoiseSchedule, make_schedule

from .onnx_graph import OPSET, onnx_from_network
from .parity import TOLERANCE, measure_parity
from .report import ParityReport
from .sources import TrainedNetwork, network_from_path

__all__ = ["ExportOptions", "bundle_from_checkpoint", "default_output"]

_PLAIN_NAMES = ("model", "checkpoint", "ema", "last", "best")  # the directory says more


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What the engine does when it is not told, and how the gate runs.

    Args:
        sampler: default sampler.
        steps: its default steps; None means what the sampler recommends (50 for DDIM), at most the
            timesteps the network was trained on.
        spacing: default timestep spacing.
        guidance_scale: default classifier-free guidance when a class is asked for; 1 is off.
        tolerance: largest relative error of one evaluation.
        threads: of the gate's ONNX Runtime and PyTorch; None means what each chooses.
    """

    sampler: str = "ddim"
    steps: int | None = None
    spacing: str = "leading"
    guidance_scale: float = 1.0
    tolerance: float = TOLERANCE
    threads: int | None = None


def bundle_from_checkpoint(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    name: str | None = None,
    force: bool = False,
    options: ExportOptions = ExportOptions(),
    progress: Callable[[str], None] = lambda _message: None,
) -> ParityReport:
    """Export a checkpoint.

    Args:
        path: what one of :data:`.sources.SOURCES` recognises.
        output: the bundle to write; None means :func:`default_output`.
        name: the engine's name; None means the output's, or its directory's if that says more.
        force: replace an engine bundle that is there.
        options: defaults of the engine, and how the gate runs.
        progress: told what is being done.

    Returns:
        The parity report, which passed.

    Raises:
        ConfigurationError: the output exists, or an option is impossible for this network.
        CheckpointError: the checkpoint cannot be used, or not safely.
        ParityError: the exported network disagrees with the PyTorch network; nothing is written.
        OSError: the output cannot be written.
    """
    source = Path(path)
    destination = default_output(source) if output is None else Path(output)
    _check_destination(destination, force=force)
    progress(f"reading {source}")
    trained = network_from_path(source)
    schedule = _schedule(trained)
    manifest = _manifest(trained, schedule, options, name or _name(destination))
    manifest = msgspec.structs.replace(manifest, provenance=_provenance(source, trained))
    progress("writing the network as ONNX")
    image = (trained.image.channels, trained.image.height, trained.image.width)
    network_bytes = onnx_from_network(trained.network, image, num_classes=trained.num_classes)
    report = measure_parity(
        trained.network,
        Bundle(manifest=manifest, network_bytes=network_bytes, schedule=schedule),
        tolerance=options.tolerance,
        threads=options.threads,
        progress=progress,
    )
    report.require()
    progress(f"writing {destination}")
    _check_destination(destination, force=force)  # minutes may have passed
    manifest = msgspec.structs.replace(manifest, parity=report.to_dict())
    write_bundle(destination, manifest, network_bytes)
    return report


def default_output(source: Path) -> Path:
    """``model.pt`` → ``model.engine`` beside it; ``a-folder`` → ``a-folder.engine``."""
    plain = source.resolve() if source.name in ("", ".", "..") else source
    stem = plain.stem if plain.is_file() else plain.name
    return plain.with_name(f"{stem}.engine")


def _name(destination: Path) -> str:
    """The bundle's name without ``.engine``; its directory's if that is a mere "model"."""
    stem = destination.name.removesuffix(".engine")
    parent = destination.resolve().parent.name
    return parent if stem in _PLAIN_NAMES and parent else stem


def _check_destination(destination: Path, *, force: bool) -> None:
    """Refuse early what cannot, or must not, be written: only an engine is ever replaced."""
    parent = destination.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        reason = "is not writable" if parent.is_dir() else "is not a directory"
        raise OSError(f"cannot write {str(destination)!r}: {str(parent)!r} {reason}.")
    if not os.path.lexists(destination):
        return
    if not force:
        raise ConfigurationError(
            f"{str(destination)!r} exists; give --force to replace it, or another --output."
        )
    if not _is_engine(destination):
        raise ConfigurationError(
            f"{str(destination)!r} exists and is not an engine, so --force does not replace it. "
            "Remove it yourself, or give another --output."
        )


def _is_engine(path: Path) -> bool:
    """Whether a path is a directory with our manifest, whole or damaged: safe to replace."""
    if path.is_symlink() or not path.is_dir():
        return False
    try:
        read_bundle(path)
    except IntegrityError:
        return True
    except BundleError:
        return False
    return True


def _schedule(trained: TrainedNetwork) -> NoiseSchedule:
    try:
        return make_schedule(**trained.schedule_spec)
    except (ConfigurationError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's noise schedule is impossible: {error}") from error


def _manifest(
    trained: TrainedNetwork, schedule: NoiseSchedule, options: ExportOptions, name: str
) -> Manifest:
    """The manifest, but for what is known later: provenance, parity, files."""
    return Manifest(
        name=name,
        image=trained.image,
        network=Network(
            prediction_type=trained.prediction_type,
            num_classes=trained.num_classes,
            class_names=trained.class_names,
            learned_variance=trained.learned_variance,
            opset=OPSET,
        ),
        schedule=dict(trained.schedule_spec),
        defaults=_defaults(trained, schedule, options),
    )


def _defaults(trained: TrainedNetwork, schedule: NoiseSchedule, options: ExportOptions) -> Defaults:
    """The engine's defaults, tried out on this network's schedule.

    Raises:
        ConfigurationError: an option is impossible.
    """
    name, _implied = resolve_sampler(options.sampler)
    recommended = min(SAMPLERS[name].recommended_steps, schedule.num_train_timesteps)
    if not 0.0 <= options.guidance_scale < float("inf"):
        raise ConfigurationError(
            f"guidance_scale must be a finite number ≥ 0 (1 is off); got {options.guidance_scale}."
        )
    defaults = Defaults(
        sampler=options.sampler,
        steps=recommended if options.steps is None else options.steps,
        spacing=options.spacing,
        guidance_scale=options.guidance_scale,
        clip_denoised=trained.clip_denoised,
    )
    build_program(
        defaults.sampler,
        schedule=schedule,
        prediction_type=trained.prediction_type,
        num_inference_steps=defaults.steps,
        spacing=defaults.spacing,
    )
    return defaults


def _provenance(source: Path, trained: TrainedNetwork) -> dict[str, str]:
    """Versions and hashes; no paths, no time: the same export gives the same manifest."""
    return {
        "made_by": f"ddpm-engine {__version__}",
        "torch": str(torch.__version__),
        "onnx": onnx.__version__,
        "onnxscript": onnxscript.__version__,
        "onnxruntime": onnxruntime.__version__,
        **({"checkpoint_sha256": _sha256(source)} if source.is_file() else {}),
        **trained.provenance,
    }


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
