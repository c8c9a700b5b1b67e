"""What sixteen bits cost: the lowered network against the float32 network it came from.

    evaluations over the noise range ─┐
    whole DDIM trajectories ──────────┼─▶ PrecisionReport ─▶ table, manifest, gate
    weights and activations ──────────┘

Everything runs on the CPU through :mod:`.precision_emulation`; ``native`` adds ONNX Runtime's own
float16, which rounds less often. Must not import torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm_runtime.backends.base import Backend, NetworkBinding
from ddpm_runtime.backends.ort import open_ort
from ddpm_runtime.bundle import Bundle
from ddpm_runtime.errors import ParityError
from ddpm_runtime.images import to_uint8
from ddpm_runtime.lanes import HostLanes
from ddpm_runtime.samplers import build_program

from .precision import WeightLoss, lower_precision, weight_losses
from .precision_emulation import activation_peaks, emulated
from .probes import Probe, probe_labels, probes

__all__ = ["TOLERANCES", "PrecisionReport", "RoundedEvaluation", "measure_precision"]

TOLERANCES = {"fp16": 3e-2, "bf16": 2e-1}
"""Largest relative error of one evaluation: six times the worst of the shipped engine, which is at
timestep 0, where the answer is smallest."""

_STEPS = 20
_SEED = 0

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class RoundedEvaluation:
    """One timestep: the worst ‖lowered − float32‖ / ‖float32‖ over its rows."""

    timestep: float
    relative_error: float


@dataclass(frozen=True, kw_only=True)
class PrecisionReport:
    """What was measured, and the verdict.

    Args:
        precision: "fp16" or "bf16".
        measured_by: what ran the lowered network.
        tolerance: largest relative error allowed.
        evaluations: from the last timestep to the first, then one between two.
        steps: of the DDIM trajectories.
        images: sampled through both networks on equal noise.
        max_abs_difference: of a final value; images lie in [−1, 1].
        root_mean_square_difference: likewise, over all values.
        within_one_level: share of 8-bit values that differ by at most 1.
        equal: share of 8-bit values that are equal.
        overflow: the first tensor that overflows, in words; None when none does.
        peak: the activation nearest to overflow, in words.
        worst_weights: the parameters that lose most, the worst first.
    """

    precision: str
    measured_by: str
    tolerance: float
    evaluations: tuple[RoundedEvaluation, ...]
    steps: int
    images: int
    max_abs_difference: float
    root_mean_square_difference: float
    within_one_level: float
    equal: float
    overflow: str | None
    peak: str
    worst_weights: tuple[WeightLoss, ...]

    @property
    def worst(self) -> RoundedEvaluation:
        """The evaluation with the largest relative error; NaN is the largest."""
        return max(self.evaluations, key=lambda e: np.nan_to_num(e.relative_error, nan=np.inf))

    @property
    def failures(self) -> list[str]:
        """Why the gate refuses, in words; empty when it passes."""
        found = []
        if self.overflow:
            found.append(f"it overflows first at {self.overflow}")
        if not self.worst.relative_error <= self.tolerance:
            found.append(
                f"relative error {self.worst.relative_error:.2e} at timestep "
                f"{self.worst.timestep:g}, {self.tolerance:.0e} is allowed"
            )
        if not np.isfinite(self.max_abs_difference):
            found.append(f"NaN or infinity after {self.steps} DDIM steps")
        return found

    def require(self) -> None:
        """Refuse a network that lost too much.

        Raises:
            ParityError: with the layer that overflows, or the worst timestep.
        """
        if self.failures:
            other = "bf16 or fp32" if self.precision == "fp16" else "fp32"
            raise ParityError(
                f"the {self.precision} network does not agree with the float32 network: "
                f"{'; '.join(self.failures)}. Export with --precision {other}."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, as the manifest keeps them."""
        return {
            **dataclasses.asdict(self),
            "passed": not self.failures,
            "evaluations": [dataclasses.asdict(e) for e in self.evaluations],
            "worst_weights": [dataclasses.asdict(w) for w in self.worst_weights],
        }

    def __str__(self) -> str:
        """A table, then trajectories, activations, weights and the verdict."""
        lines = [f"{self.precision} against float32, by {self.measured_by}"]
        lines += ["{:>9}  {:>14}".format("timestep", "relative error")]
        lines += [f"{e.timestep:>9g}  {e.relative_error:>14.2e}" for e in self.evaluations]
        lines += [
            f"{self.images} images of {self.steps} DDIM steps: max |difference| "
            f"{self.max_abs_difference:.2e}, RMS {self.root_mean_square_difference:.2e}, 8-bit "
            f"values {self.equal:.2%} equal, {self.within_one_level:.2%} within one level",
            f"largest activation: {self.peak}",
        ]
        lines += [
            f"weights that lose most: {w.name} {w.relative_error:.2e} relative, {w.subnormal} of "
            f"{w.values} subnormal, {w.flushed} flushed to zero"
            for w in self.worst_weights[:1]
        ]
        verdict = "FAILED: " + "; ".join(self.failures) if self.failures else "passed"
        return "\n".join([*lines, f"precision: {verdict}"])


def measure_precision(
    bundle: Bundle,
    precision: str,
    *,
    lowered: bytes | None = None,
    native: bool = False,
    tolerance: float | None = None,
    rows: int = 4,
    threads: int | None = None,
    progress: Progress = lambda _message: None,
) -> PrecisionReport:
    """Compare a float32 bundle with itself in sixteen bits; ``report.require()`` is the gate.

    Args:
        bundle: the float32 network and its schedule.
        precision: "fp16" or "bf16".
        lowered: the lowered network; None means :func:`lower_precision` of the bundle's.
        native: measure ONNX Runtime's own float16 rather than the emulation.
        tolerance: largest relative error of one evaluation; None means :data:`TOLERANCES`.
        rows: images of every evaluation and of the trajectories.
        threads: of ONNX Runtime; None means what it chooses.
        progress: told what is being done.

    Raises:
        ConfigurationError: "fp32" or an unknown precision.
        ParityError: a weight overflows.
        BackendError: ONNX Runtime cannot run the network (bfloat16, natively).
    """
    losses = weight_losses(bundle.network_bytes, precision)
    lowered = lowered or lower_precision(bundle.network_bytes, precision)
    made = probes(bundle, rows)
    progress(f"looking for overflow in {precision}")
    peaks = activation_peaks(
        lowered, [_inputs(bundle, probe) for probe in made], threads=threads or 0
    )
    steps = min(_STEPS, bundle.schedule.num_train_timesteps)
    reference = open_ort(bundle, threads=threads)
    other_bytes = lowered if native else emulated(lowered)
    other = open_ort(dataclasses.replace(bundle, network_bytes=other_bytes), threads=threads)
    try:
        bindings = reference.allocate(rows), other.allocate(rows)
        evaluations = []
        for count, probe in enumerate(made, 1):
            progress(f"{precision} at timestep {probe.timestep:g} ({count}/{len(made)})")
            evaluations.append(_evaluate(probe, *bindings))
        progress(f"sampling in {precision}")
        images = [_sample(bundle, one, steps, rows) for one in (other, reference)]
    finally:
        reference.close()
        other.close()
    return PrecisionReport(
        precision=precision,
        measured_by=_measured_by(precision, other.description, native=native),
        tolerance=TOLERANCES[precision] if tolerance is None else tolerance,
        evaluations=tuple(evaluations),
        steps=steps,
        images=rows,
        **_image_differences(*images),
        overflow=next((str(peak) for peak in peaks if peak.overflows), None),
        peak=str(max(peaks, key=lambda peak: np.nan_to_num(peak.peak, nan=np.inf))),
        worst_weights=tuple(losses[:3]),
    )


def _image_differences(
    found: NDArray[np.float32], expected: NDArray[np.float32]
) -> dict[str, float]:
    """The fields of a report that compare final images; a value that is not finite differs."""
    finite = np.isfinite(found)
    with np.errstate(all="ignore"):
        difference = np.abs(found.astype(np.float64) - expected)
    levels = np.abs(to_uint8(np.where(finite, found, 0)).astype(np.int16) - to_uint8(expected))
    levels[~np.moveaxis(finite, -3, -1)] = 255
    return {
        "max_abs_difference": float(difference.max()),
        "root_mean_square_difference": float(np.sqrt(np.square(difference).mean())),
        "within_one_level": float((levels <= 1).mean()),
        "equal": float((levels == 0).mean()),
    }


def _measured_by(precision: str, description: str, *, native: bool) -> str:
    library = description.rpartition(", ")[0]  # the rest names the float32 bundle's precision
    if native:
        return f"{library}, its own {precision} (parts of it in float32, unrounded)"
    return f"emulation ({library}; float32 sums, every {precision} tensor rounded)"


def _inputs(bundle: Bundle, probe: Probe) -> dict[str, NDArray[np.generic]]:
    inputs: dict[str, NDArray[np.generic]] = {
        "sample": probe.sample,
        "timestep": probe.timesteps,
    }
    if bundle.manifest.network.num_classes:
        inputs["label"] = probe.label
    return inputs


def _evaluate(probe: Probe, reference: NetworkBinding, other: NetworkBinding) -> RoundedEvaluation:
    rows = len(probe.sample)
    for binding in (reference, other):
        binding.sample[:rows] = probe.sample
        binding.timestep[:rows] = probe.timesteps
        binding.label[:rows] = probe.label
        binding.run(rows)
    expected = reference.prediction[:rows].reshape(rows, -1).astype(np.float64)
    found = other.prediction[:rows].reshape(rows, -1)
    with np.errstate(all="ignore"):
        errors = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    return RoundedEvaluation(timestep=probe.timestep, relative_error=float(errors.max()))


def _sample(bundle: Bundle, backend: Backend, steps: int, images: int) -> NDArray[np.float32]:
    """Final images (images, C, H, W) of one DDIM program on the runtime's own noise."""
    defaults, network = bundle.manifest.defaults, bundle.manifest.network
    program = build_program(
        "ddim",
        schedule=bundle.schedule,
        prediction_type=network.prediction_type,
        num_inference_steps=steps,
        spacing=defaults.spacing,
        clip=1.0 if defaults.clip_denoised else float("inf"),
    )
    labels = probe_labels(network.num_classes, images)
    lanes = HostLanes(backend, images)
    for index in range(images):
        label = labels[index % len(labels)]
        lanes.start(program, seed=_SEED, index=index, label=label, tag=index)
    finished = {}
    while lanes.active:
        finished.update({lane.tag: lane.image for lane in lanes.advance()})
    return np.stack([finished[index] for index in range(images)])
