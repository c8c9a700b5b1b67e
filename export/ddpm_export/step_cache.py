"""The network in two parts, for step caching: ``ddpm-export --step-cache``.

    whole     the network, which also answers its deep features
    shallow   what lies outside of them: the first layers, the outermost skip connections, the last
              layers; it takes the deep features instead of computing them

A U-Net's skip connections meet what came up from below in a Concat: cutting there parts the graph
in two, whatever wrote it. Both parts hold their own weights; network.onnx stays as it is. Must not
import torch.

Source: Ma et al. (DeepCache), arXiv 2312.00858 §3.2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import onnx
from onnx import ModelProto, NodeProto, shape_inference
from onnx.utils import Extractor

from ddpm_runtime.backends.ort import open_ort
from ddpm_runtime.bundle import Bundle, CachedNetwork, StepCache
from ddpm_runtime.errors import ConfigurationError, ParityError

from .probes import Probe, probes

__all__ = ["StepCacheReport", "cached_bundle"]

TOLERANCE = 1e-5  # of an evaluation in two parts, against the network in one

_BATCH = 4
_DEEP = "deep"


@dataclass(frozen=True, kw_only=True)
class StepCacheReport:
    """What the two parts are, and that together they are the network.

    Args:
        skips: skip connections outside the deep features.
        deep: (channels, height, width) of the deep features.
        nodes: operators in the network, and in its shallow part.
        relative_error: largest ‖parts − network‖ / ‖network‖ of an evaluation.
        tolerance: largest that passes.
    """

    skips: int
    deep: tuple[int, int, int]
    nodes: tuple[int, int]
    relative_error: float
    tolerance: float = TOLERANCE

    def require(self) -> None:
        """Refuse parts that are not the network.

        Raises:
            ParityError: they differ by more than the tolerance.
        """
        if not self.relative_error <= self.tolerance:
            raise ParityError(
                f"the network in two parts differs from the network by {self.relative_error:.2g} "
                f"(relative), more than {self.tolerance:g}. Nothing was written; leave out "
                "--step-cache, or keep another number of skip connections."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """One line."""
        channels, height, width = self.deep
        return (
            f"step caching: {self.skips} skip connection(s) outside, deep features {channels}×"
            f"{height}×{width}, {self.nodes[1]} of {self.nodes[0]} operators in the shallow part; "
            f"together within {self.relative_error:.1e} of the network (limit {self.tolerance:g})"
        )


def cached_bundle(
    bundle: Bundle,
    skips: int,
    *,
    threads: int | None = None,
    progress: Callable[[str], None] = lambda _message: None,
) -> tuple[Bundle, StepCacheReport]:
    """Add the two parts of the network to a bundle.

    Args:
        bundle: float32, in memory.
        skips: outermost skip connections that a shallow evaluation computes afresh, ≥ 1: more of
            them cost more and lose less.
        threads: of ONNX Runtime; None means what it chooses.
        progress: told what is being done.

    Returns:
        The bundle with ``cached`` and its description in the manifest; and the report, which
        passed.

    Raises:
        ConfigurationError: another precision, or a network without so many skip connections.
        ParityError: the parts are not the network.
    """
    own = bundle.manifest.network.precision
    if own != "fp32":
        raise ConfigurationError(
            f"step caching was asked for a network in {own}; it is for float32 networks, on the "
            "processor. Leave out --step-cache or --precision."
        )
    progress("parting the network for step caching")
    whole, shallow, deep = _parts(bundle.network_bytes, skips)
    described = msgspec.structs.replace(
        bundle.manifest.network, step_cache=StepCache(deep=deep, skips=skips)
    )
    manifest = msgspec.structs.replace(bundle.manifest, network=described)
    cached = CachedNetwork(
        whole_bytes=whole.SerializeToString(deterministic=True),
        shallow_bytes=shallow.SerializeToString(deterministic=True),
    )
    parted = dataclasses.replace(bundle, manifest=manifest, cached=cached)
    report = StepCacheReport(
        skips=skips,
        deep=deep,
        nodes=(len(whole.graph.node), len(shallow.graph.node)),
        relative_error=_relative_error(parted, threads),
    )
    report.require()
    manifest = msgspec.structs.replace(
        manifest, parity={**manifest.parity, "step_cache": report.to_dict()}
    )
    return dataclasses.replace(parted, manifest=manifest), report


def _parts(network_bytes: bytes, skips: int) -> tuple[ModelProto, ModelProto, tuple[int, int, int]]:
    """The whole network with its deep features as an output, the shallow part, their shape."""
    model = shape_inference.infer_shapes(
        onnx.load_model_from_string(network_bytes), strict_mode=True, data_prop=True
    )
    cuts = _cuts(model)
    if not 1 <= skips <= len(cuts):
        raise ConfigurationError(
            f"--step-cache {skips} was asked; this network has {len(cuts)} skip connections that "
            f"it can be parted at. Choose 1 to {len(cuts)}."
            if cuts
            else f"--step-cache {skips} was asked, and this network has no skip connections: it "
            "is no U-Net. Leave it out."
        )
    name, deep = cuts[skips - 1]
    inputs = [value.name for value in model.graph.input]
    shallow = Extractor(model).extract_model([*inputs, name], ["prediction"])
    whole = onnx.load_model_from_string(network_bytes)
    whole.graph.output.append(
        onnx.helper.make_tensor_value_info(
            name, onnx.TensorProto.FLOAT, [_batch_name(whole), *deep]
        )
    )
    for part in (whole, shallow):
        _rename(part, name)
        del part.graph.value_info[:]
        onnx.checker.check_model(part, full_check=True)
    return whole, shallow, deep


def _cuts(model: ModelProto) -> list[tuple[str, tuple[int, int, int]]]:
    """Tensors that come up from below into a skip connection, the outermost first; with shapes."""
    shapes = {value.name: _tail(value) for value in model.graph.value_info}
    produced = {name: i for i, node in enumerate(model.graph.node) for name in node.output}
    cuts = []
    for node in model.graph.node:
        tails = [shapes.get(name) for name in node.input]
        if node.op_type == "Concat" and _axis(node) == 1 and len(tails) == 2 and all(tails):
            name = max(
                node.input, key=lambda one: produced[one]
            )  # the skip was made on the way down
            cuts.append((name, shapes[name]))
    return [(name, shape) for name, shape in reversed(cuts) if shape is not None]


def _tail(value: onnx.ValueInfoProto) -> tuple[int, int, int] | None:
    """(C, H, W) of an image-shaped tensor whose batch is dynamic."""
    sizes = [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
    return (sizes[1], sizes[2], sizes[3]) if len(sizes) == 4 and min(sizes[1:]) > 0 else None


def _axis(node: NodeProto) -> int:
    return next(int(one.i) for one in node.attribute if one.name == "axis")


def _batch_name(model: ModelProto) -> str:
    return str(model.graph.input[0].type.tensor_type.shape.dim[0].dim_param)


def _rename(model: ModelProto, name: str) -> None:
    """Call a tensor "deep", wherever it is."""
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [_DEEP if one == name else one for one in names]
    for value in (*model.graph.input, *model.graph.output):
        if value.name == name:
            value.name = _DEEP
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = _batch_name(model)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = _batch_name(model)


def _relative_error(bundle: Bundle, threads: int | None) -> float:
    """Whole, then shallow on what the whole kept, against the network in one; the worst row."""
    backend = open_ort(bundle, threads=threads)
    try:
        plain, parts = backend.allocate(_BATCH), backend.allocate_cached(_BATCH)
        worst = 0.0
        for probe in probes(bundle, _BATCH):
            for binding in (plain, parts):
                _write(binding, probe)
            plain.run(_BATCH)
            for run in (parts.run_whole, parts.run_shallow):
                run(_BATCH)
                difference = np.linalg.norm(
                    (parts.prediction - plain.prediction).reshape(_BATCH, -1), axis=1
                )
                size = np.linalg.norm(plain.prediction.reshape(_BATCH, -1), axis=1)
                with np.errstate(all="ignore"):
                    ratio = float((difference / size).max())
                worst = max(worst, ratio if np.isfinite(ratio) else float("inf"))
    finally:
        backend.close()
    return worst


def _write(binding: Any, probe: Probe) -> None:
    binding.sample[:], binding.timestep[:] = probe.sample, probe.timesteps
    binding.label[:] = probe.label
