"""A float32 bundle in sixteen bits, measured and passed: ``ddpm-export --precision``.

A checkpoint's bundle comes here once it has passed the parity gate; an engine that is already on
disk comes as it is (again.py). Both give the same bytes. Must not import torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable

import msgspec
import onnx

from ddpm_runtime._version import __version__
from ddpm_runtime.bundle import Bundle
from ddpm_runtime.errors import ConfigurationError

from .precision import lower_precision
from .precision_report import PrecisionReport, measure_precision

__all__ = ["lowered_bundle"]


def lowered_bundle(
    bundle: Bundle,
    precision: str,
    *,
    tolerance: float | None = None,
    threads: int | None = None,
    progress: Callable[[str], None] = lambda _message: None,
) -> tuple[Bundle, PrecisionReport]:
    """Lower a bundle that has passed the parity gate, and let it pass the next.

    Args:
        bundle: float32, in memory.
        precision: "fp16" or "bf16".
        tolerance: largest relative error of one evaluation against float32; None means
            :data:`.precision_report.TOLERANCES`.
        threads: of ONNX Runtime; None means what it chooses.
        progress: told what is being done.

    Returns:
        The bundle with the lowered network: precision and opset in its manifest, the figures in
        ``parity["precision"]`` beside those of the float32 network, whose hash is in its
        provenance; and the report.

    Raises:
        ParityError: a weight or an activation overflows, or it loses too much; names the layer.
        ConfigurationError: an unknown precision, or a network that cannot be lowered.
    """
    own = bundle.manifest.network.precision
    if own != "fp32":
        raise ConfigurationError(
            f"{bundle.manifest.name!r} was asked for in {precision} and is in {own} already: what "
            "it lost is lost. Give the float32 engine it came from."
        )
    network = lower_precision(bundle.network_bytes, precision)
    report = measure_precision(
        bundle, precision, lowered=network, tolerance=tolerance, threads=threads, progress=progress
    )
    report.require()
    described = msgspec.structs.replace(
        bundle.manifest.network,
        precision=precision,
        opset=_opset(network),
        step_cache=msgspec.UNSET,  # its parts are float32
    )
    manifest = msgspec.structs.replace(
        bundle.manifest,
        network=described,
        parity={**bundle.manifest.parity, "precision": report.to_dict()},
        provenance={
            **bundle.manifest.provenance,
            "lowered_by": f"ddpm-engine {__version__}, onnx {onnx.__version__}",
            "lowered_from_sha256": hashlib.sha256(bundle.network_bytes).hexdigest(),
        },
    )
    lowered = dataclasses.replace(bundle, manifest=manifest, network_bytes=network, cached=None)
    return lowered, report


def _opset(network: bytes) -> int:
    imports = onnx.load_model_from_string(network).opset_import
    return next(int(one.version) for one in imports if one.domain in ("", "ai.onnx"))
