"""The gate: an exported network must answer as the PyTorch network does, or no bundle is written.

The ONNX bytes that would be written run in ONNX Runtime, through the backend that will serve them,
against the PyTorch network in float64 (the reference) and float32:

- evaluations over the whole noise range, every class and "no class", each row in a batch and alone;
- whole trajectories: one sampler program on the same noise, through both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn

from ddpm_runtime.backends import Backend, FunctionBackend
from ddpm_runtime.backends.base import NetworkBinding
from ddpm_runtime.backends.ort import open_ort
from ddpm_runtime.bundle import Bundle
from ddpm_runtime.errors import ParityError
from ddpm_runtime.images import to_uint8
from ddpm_runtime.lanes import HostLanes
from ddpm_runtime.program import SamplerProgram
from ddpm_runtime.samplers import build_program

from .probes import Probe, probe_labels, probes
from .report import Evaluation, ParityReport, SampledImages

__all__ = ["TOLERANCE", "measure_parity"]

TOLERANCE = 1e-5  # float32 rounding alone costs 3e-7 to 1e-6 on networks of 40 to 80 convolutions

_STEPS = 10
_SEED = 0

Progress = Callable[[str], None]
Network = Callable[[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]], NDArray[Any]]


def measure_parity(
    network: nn.Module,
    bundle: Bundle,
    *,
    tolerance: float = TOLERANCE,
    batch_size: int = 4,
    threads: int | None = None,
    progress: Progress = lambda _message: None,
) -> ParityReport:
    """Compare a bundle with the network it came from; ``report.require()`` is the gate.

    Args:
        network: the PyTorch network, in eval mode, float32.
        bundle: what is about to be written.
        tolerance: largest relative error of one evaluation.
        batch_size: rows of an evaluation, ≥ 2, and images of the trajectory.
        threads: of ONNX Runtime and of PyTorch; None means what each chooses.
        progress: told what is being done.

    Raises:
        ParityError: a weight in the ONNX file is NaN or infinite.
        NetworkMismatchError, BackendError: ONNX Runtime refuses the network.
    """
    _refuse_non_finite_weights(bundle.network_bytes)
    backend = open_ort(bundle, threads=threads)
    classes = bundle.manifest.network.num_classes
    single = _pytorch(network, torch.float32, classes)
    double = _pytorch(copy.deepcopy(network).double(), torch.float64, classes)
    torch_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or torch_threads)
        made = probes(bundle, batch_size)
        binding = backend.allocate(batch_size)
        evaluations = []
        for count, probe in enumerate(made, 1):
            progress(f"comparing with PyTorch at timestep {probe.timestep:g} ({count}/{len(made)})")
            evaluations.append(_evaluate(probe, binding, single, double))
        progress("comparing sampled images with PyTorch")
        reference = FunctionBackend(
            single,
            backend.shape.image,
            num_classes=classes,
            prediction_channels=backend.shape.prediction_channels,
        )
        sampled = _sample_both(bundle, backend, reference, batch_size)
    finally:
        torch.set_num_threads(torch_threads)
        backend.close()
    labels = {int(label) for probe in made for label in probe.label}
    return ParityReport(
        tolerance=tolerance,
        batch_size=batch_size,
        labels=tuple(sorted(labels)) if classes else (),
        evaluations=tuple(evaluations),
        sampled=sampled,
    )


def _pytorch(network: nn.Module, dtype: torch.dtype, num_classes: int) -> Network:
    """The network as a function of NumPy arrays; samples are given to it in ``dtype``."""

    def predict(
        sample: NDArray[np.float32], timestep: NDArray[np.float32], label: NDArray[np.int64]
    ) -> NDArray[Any]:
        arguments = [torch.tensor(sample, dtype=dtype), torch.tensor(timestep)]
        if num_classes:
            arguments.append(torch.tensor(label))
        with torch.inference_mode():
            prediction: NDArray[Any] = network(*arguments).numpy()
        return prediction

    return predict


def _evaluate(
    probe: Probe, binding: NetworkBinding, single: Network, double: Network
) -> Evaluation:
    """One probe through all three, its rows also one by one."""
    inputs = (probe.sample, probe.timesteps, probe.label)
    rows = len(probe.sample)
    together = _run(binding, probe, slice(0, rows))
    alone = np.concatenate([_run(binding, probe, slice(i, i + 1)) for i in range(rows)])
    reference, float32 = double(*inputs), single(*inputs)
    answers = (together, alone, float32, reference)
    size = _norms(reference)
    return Evaluation(
        timestep=probe.timestep,
        relative_error=max(_relative(together, reference), _relative(alone, reference)),
        relative_error_float32=_relative(together, float32),
        pytorch_relative_error=_relative(float32, reference),
        max_abs_difference=float(np.abs([together - reference, alone - reference]).max()),
        smallest_answer=float(size.min() / np.sqrt(reference[0].size)),
        rows_identical=together.tobytes() == alone.tobytes(),
        finite=all(bool(np.isfinite(answer).all()) for answer in answers),
    )


def _run(binding: NetworkBinding, probe: Probe, part: slice) -> NDArray[np.float32]:
    """The backend's predictions for some rows of a probe."""
    rows = part.stop - part.start
    binding.sample[:rows] = probe.sample[part]
    binding.timestep[:rows] = probe.timesteps[part]
    binding.label[:rows] = probe.label[part]
    binding.run(rows)
    answer: NDArray[np.float32] = binding.prediction[:rows].copy()
    return answer


def _relative(answer: NDArray[Any], reference: NDArray[Any]) -> float:
    """The largest ‖answer − reference‖ / ‖reference‖ of a row; infinity where that has no value."""
    with np.errstate(all="ignore"):
        ratios = _norms(answer.astype(np.float64) - reference) / _norms(reference)
    return float(np.where(np.isfinite(ratios), ratios, np.inf).max())


def _norms(answer: NDArray[Any]) -> NDArray[np.float64]:
    """(rows,) the Euclidean norm of every row."""
    norms: NDArray[np.float64] = np.linalg.norm(
        answer.reshape(len(answer), -1).astype(np.float64), axis=1
    )
    return norms


def _sample_both(
    bundle: Bundle, backend: Backend, reference: Backend, images: int
) -> SampledImages:
    """The bundle's own defaults in DDIM steps, on equal noise, through both backends."""
    defaults, network = bundle.manifest.defaults, bundle.manifest.network
    program = build_program(
        "ddim",
        schedule=bundle.schedule,
        prediction_type=network.prediction_type,
        num_inference_steps=min(_STEPS, bundle.schedule.num_train_timesteps),
        spacing=defaults.spacing,
        clip=1.0 if defaults.clip_denoised else float("inf"),
    )
    labels = probe_labels(network.num_classes, images)
    with np.errstate(all="ignore"):  # an overflow is judged below
        drawn = [
            _sample(one, program, images, labels, defaults.guidance_scale)
            for one in (backend, reference)
        ]
        found, expected = (to_uint8(one).astype(np.int16) for one in drawn)
        difference = float(np.abs(drawn[0] - drawn[1]).max())
    levels = np.abs(found - expected)
    return SampledImages(
        sampler="ddim",
        steps=len(program),
        images=images,
        max_abs_difference=difference,
        within_one_level=float((levels <= 1).mean()),
        equal=float((levels == 0).mean()),
        finite=bool(np.isfinite(drawn).all()),
    )


def _sample(
    backend: Backend, program: SamplerProgram, images: int, labels: list[int], guidance: float
) -> NDArray[np.float32]:
    """Final images (images, C, H, W) in order of index."""
    lanes = HostLanes(backend, images)
    for index in range(images):
        label = labels[index % len(labels)]
        scale = 1.0 if label == backend.shape.num_classes else guidance
        lanes.start(program, seed=_SEED, index=index, label=label, guidance_scale=scale, tag=index)
    finished = {}
    while lanes.active:
        finished.update({lane.tag: lane.image for lane in lanes.advance()})
    return np.stack([finished[index] for index in range(images)])


def _refuse_non_finite_weights(network_bytes: bytes) -> None:
    """Look at every constant of the ONNX file itself: it is what will be served."""
    for tensor in onnx.load_model_from_string(network_bytes).graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ParityError(
                f"the ONNX network holds NaN or infinity in {tensor.name!r}. Nothing was written; "
                "export an earlier checkpoint."
            )
