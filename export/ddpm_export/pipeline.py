"""From a checkpoint to a bundle that has proved itself: ``bundle_from_checkpoint``.

    checkpoint ─▶ ONNX bytes ─▶ compared with PyTorch ─┬▶ bundle
                                                       └▶ fp16, bf16 ─▶ compared again ─▶ bundle

Nothing is written before every gate has passed, and then everything in one step.
"""

from __future__ import annotations

import dataclasses
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
from ddpm_runtime.bundle import Bundle, Defaults, Manifest, Network, write_bundle
from ddpm_runtime.errors import CheckpointError, ConfigurationError, choose
from ddpm_runtime.samplers import SAMPLERS, build_program, resolve_sampler
from ddpm_runtime.schedule import NoiseSchedule, make_schedule

from .destination import PRECISIONS, check_destination, default_output, engine_name
from .onnx_graph import OPSET, onnx_from_network
from .parity import TOLERANCE, measure_parity
from .precision_bundle import lowered_bundle
from .precision_report import PrecisionReport
from .report import ParityReport
from .sources import TrainedNetwork, network_from_path
from .step_cache import StepCacheReport, cached_bundle

__all__ = ["ExportOptions", "ExportReport", "bundle_from_checkpoint"]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What the engine does when it is not told, and how the gate runs.

    Args:
        sampler: default sampler.
        steps: its default steps; None means what the sampler recommends (50 for DDIM), at most the
            timesteps the network was trained on.
        spacing: default timestep spacing; None means what the sampler recommends.
        guidance_scale: default classifier-free guidance when a class is asked for; 1 is off.
        precision: what the network is written in: "fp32", "fp16" or "bf16". The last two are
            lowered from the float32 network once that has passed, and pass a gate of their own.
        step_cache: skip connections outside the deep features of a step cache; None for no cache.
        tolerance: largest relative error of one float32 evaluation against PyTorch.
        threads: of the gate's ONNX Runtime and PyTorch; None means what each chooses.
    """

    sampler: str = "ddim"
    steps: int | None = None
    spacing: str | None = None
    guidance_scale: float = 1.0
    precision: str = "fp32"
    step_cache: int | None = None
    tolerance: float = TOLERANCE
    threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What the gates measured; they passed.

    Args:
        parity: the float32 network against PyTorch.
        precision: the lowered network against the float32 one; None for fp32.
        step_cache: the network in two parts against the network; None without step caching.
    """

    parity: ParityReport
    precision: PrecisionReport | None = None
    step_cache: StepCacheReport | None = None

    def __str__(self) -> str:
        """The tables, one after the other."""
        reports = (self.parity, self.precision, self.step_cache)
        return "\n\n".join(str(report) for report in reports if report is not None)


def bundle_from_checkpoint(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    name: str | None = None,
    force: bool = False,
    options: ExportOptions = ExportOptions(),
    progress: Callable[[str], None] = lambda _message: None,
) -> ExportReport:
    """Export a checkpoint.

    Args:
        path: what one of :data:`.sources.SOURCES` recognises.
        output: the bundle to write; None means :func:`.destination.default_output`.
        name: the engine's name; None means the output's, or its directory's if that says more.
        force: replace an engine bundle that is there.
        options: defaults of the engine, and how the gate runs.
        progress: told what is being done.

    Returns:
        The reports, which passed; the manifest has them both.

    Raises:
        ConfigurationError: the output exists, or an option is impossible for this network.
        CheckpointError: the checkpoint cannot be used, or not safely.
        ParityError: the exported network disagrees with the PyTorch network, or its lowered form
            overflows or loses too much, by the name of the layer; nothing is written.
        OSError: the output cannot be written.
    """
    source, precision = Path(path), choose("precision", options.precision, PRECISIONS)
    if options.step_cache is not None and precision != "fp32":
        raise ConfigurationError(
            f"a step cache was asked for together with {precision}; it is for float32 networks, on "
            "the processor. Leave out one of them."
        )
    destination = default_output(source, precision) if output is None else Path(output)
    check_destination(destination, force=force)
    progress(f"reading {source}")
    trained = network_from_path(source)
    schedule = _schedule(trained)
    manifest = _manifest(trained, schedule, options, name or engine_name(destination, precision))
    manifest = msgspec.structs.replace(manifest, provenance=_provenance(source, trained))
    progress("writing the network as ONNX")
    image = (trained.image.channels, trained.image.height, trained.image.width)
    network_bytes = onnx_from_network(trained.network, image, num_classes=trained.num_classes)
    bundle = Bundle(manifest=manifest, network_bytes=network_bytes, schedule=schedule)
    bundle, report = _gated(bundle, trained, options, progress)
    progress(f"writing {destination}")
    check_destination(destination, force=force)  # minutes may have passed
    write_bundle(destination, bundle.manifest, bundle.network_bytes, bundle.cached)
    return report


def _gated(
    bundle: Bundle,
    trained: TrainedNetwork,
    options: ExportOptions,
    progress: Callable[[str], None],
) -> tuple[Bundle, ExportReport]:
    """The bundle as it may be written, with what the gates measured in its manifest.

    Raises:
        ParityError: a gate refuses it.
    """
    threads = options.threads
    parity = measure_parity(
        trained.network, bundle, tolerance=options.tolerance, threads=threads, progress=progress
    )
    parity.require()
    manifest = msgspec.structs.replace(bundle.manifest, parity=parity.to_dict())
    bundle = dataclasses.replace(bundle, manifest=manifest)
    if options.step_cache is not None:
        bundle, parts = cached_bundle(
            bundle, options.step_cache, threads=threads, progress=progress
        )
        return bundle, ExportReport(parity=parity, step_cache=parts)
    if options.precision == "fp32":
        return bundle, ExportReport(parity=parity)
    bundle, precision = lowered_bundle(
        bundle, options.precision, threads=threads, progress=progress
    )
    return bundle, ExportReport(parity=parity, precision=precision)


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
        spacing=options.spacing or SAMPLERS[name].recommended_spacing,
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
