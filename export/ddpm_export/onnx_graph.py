"""A PyTorch network as the bytes of an ONNX file: ``onnx_from_network``.

    sample      float32 (batch, C, H, W)
    timestep    float32 (batch,)
    label       int64   (batch,)            only with num_classes > 0
    prediction  float32 (batch, C or 2·C, H, W)

The batch is the only dynamic dimension. The opset is 18: the oldest that PyTorch's exporter writes
without converting, so that every ONNX Runtime since 1.14, OpenVINO, TensorRT 10 and TensorRT-RTX
read it; nothing newer makes these networks faster (:mod:`.operators` has the measurements). Weights
are inside the file. The same weights give the same bytes: names come from the order of the trace,
and everything that describes the machine or the source code (stack traces, documentation strings,
metadata, inferred shapes of intermediate values) is removed.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from torch import nn

from ddpm_runtime.errors import CheckpointError, ConfigurationError

from .operators import TRANSLATIONS

__all__ = ["OPSET", "onnx_from_network"]

OPSET = 18

_LARGEST_BATCH = 1 << 16
_MAX_FILE_BYTES = (1 << 31) - 1  # a protobuf message holds no more


def onnx_from_network(
    network: nn.Module, image: tuple[int, int, int], *, num_classes: int = 0
) -> bytes:
    """Write a network as ONNX.

    Args:
        network: called as ``network(sample, timestep[, label])``; every module in eval mode.
        image: (C, H, W) of a sample.
        num_classes: 0 when the network takes no label.

    Returns:
        The ONNX file, whole: no external data.

    Raises:
        ConfigurationError: a module is in training mode.
        CheckpointError: NaN or infinite weights, a network over 2 GiB, or one that PyTorch cannot
            write as ONNX.
    """
    _refuse_training_mode(network)
    _refuse_unusable_weights(network)
    arguments = _example(image, num_classes)
    names = ["sample", "timestep", "label"][: len(arguments)]
    batch = torch.export.Dim("batch", min=1, max=_LARGEST_BATCH)
    try:
        with torch.no_grad(), _quiet_exporter():
            program: Any = torch.onnx.export(
                network,
                arguments,
                dynamo=True,
                opset_version=OPSET,
                input_names=names,
                output_names=["prediction"],
                dynamic_shapes=tuple({0: batch} for _ in arguments),
                custom_translation_table=TRANSLATIONS,
                optimize=True,
                verbose=False,
            )
    except Exception as error:  # the exporter raises many unrelated types
        cause = _root_cause(error)
        raise CheckpointError(
            f"PyTorch cannot write this network as ONNX ({type(cause).__name__}: "
            f"{_first_line(cause)})."
        ) from error
    model = program.model_proto
    _anonymise(model)
    onnx.checker.check_model(model, full_check=True)
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def _refuse_training_mode(network: nn.Module) -> None:
    """A wrapper left in training mode exports dropout, silently: look at every module."""
    for name, module in network.named_modules():
        if module.training:
            raise ConfigurationError(
                f"the network is in training mode (module {name or type(module).__name__!r}); "
                "call network.eval() before exporting."
            )


def _refuse_unusable_weights(network: nn.Module) -> None:
    total_bytes = 0
    for name, value in network.state_dict().items():
        total_bytes += value.numel() * value.element_size()
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f"the weights {name!r} have NaN or infinite values; use an earlier checkpoint."
            )
    if total_bytes > _MAX_FILE_BYTES:
        raise CheckpointError(
            f"the weights take {total_bytes} bytes; one ONNX file holds {_MAX_FILE_BYTES}."
        )


def _example(image: tuple[int, int, int], num_classes: int) -> tuple[torch.Tensor, ...]:
    """Arguments to trace with. A batch of two: the exporter would take one for a constant."""
    sample, timestep = torch.zeros(2, *image), torch.zeros(2)
    if not num_classes:
        return sample, timestep
    return sample, timestep, torch.zeros(2, dtype=torch.int64)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence notes on optional packages and on the exporter's own future."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _anonymise(model: onnx.ModelProto) -> None:
    """Remove all that does not compute: it names files and functions of the exporting machine."""
    graph = model.graph
    del graph.value_info[:]
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
        part.ClearField("doc_string")
    graph.name = "network"
    model.producer_name = "ddpm-engine"
    for field in ("producer_version", "domain", "model_version"):
        model.ClearField(field)


def _root_cause(error: BaseException) -> BaseException:
    return error if error.__cause__ is None else _root_cause(error.__cause__)


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [""])[0]
