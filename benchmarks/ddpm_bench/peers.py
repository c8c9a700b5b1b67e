"""One step of a batch by each peer, as its own users would write it, with the same weights.

Every peer is a callable without arguments that does one whole step: evaluate the network, update
x_t. Those marked *network only* do not even update x_t: an upper limit for what is around them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ddpm_runtime.bundle import Bundle
from ddpm_train.unet import UNetConfig

__all__ = ["Peer", "build_peers"]

Step = Callable[[], Any]

_STEPS = 50


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A way to do one step.

    Args:
        name: stable, part of a case's id.
        precision: what it computes in.
        build: makes the step; raises ImportError when its library is missing.
        note: what is unlike ours.
    """

    name: str
    precision: str
    build: Callable[[], Step]
    note: str = ""


def build_peers(
    network: Any,
    equal_network: Callable[[], Any],
    config: UNetConfig,
    bundle: Bundle,
    batch: int,
    threads: int,
) -> list[Peer]:
    """Every peer at one batch size.

    Args:
        network: our U-Net in PyTorch, with the bundle's weights.
        equal_network: makes diffusers' U-Net of the same size.
        config: of both.
        bundle: the exported network.
        batch: images.
        threads: for every library.
    """
    inputs = _inputs(config, batch)
    graph = bundle.network_bytes
    ours = "our U-Net, the same weights"
    labelled = config.num_classes > 0
    return [
        Peer(
            name="diffusers-pipeline-eager",
            precision="fp32",
            build=lambda: _diffusers_step(equal_network(), inputs, labelled=labelled),
            note="diffusers' own UNet2DModel of equal size, DDIMScheduler",
        ),
        Peer(
            name="torch-eager",
            precision="fp32",
            build=lambda: _torch_step(network, inputs),
            note=f"{ours}, diffusers' DDIMScheduler",
        ),
        Peer(
            name="torch-compile",
            precision="fp32",
            build=lambda: _torch_step(_compiled(network), inputs),
            note=f"{ours}, frozen, diffusers' DDIMScheduler",
        ),
        Peer(
            name="torch-compile",
            precision="bf16",
            build=lambda: _torch_step(_compiled(network), inputs, autocast=True),
            note=f"{ours}, frozen, autocast, diffusers' DDIMScheduler",
        ),
        Peer(
            name="onnxruntime-plain",
            precision="fp32",
            build=lambda: _ort_step(graph, inputs, threads),
            note="network only: session.run",
        ),
        Peer(
            name="openvino-native",
            precision="fp32",
            build=lambda: _openvino_step(graph, inputs, threads, "f32"),
            note="network only: one static shape for the whole batch",
        ),
        Peer(
            name="openvino-native",
            precision="bf16",
            build=lambda: _openvino_step(graph, inputs, threads, "bf16"),
            note="network only: one static shape for the whole batch",
        ),
    ]


def _inputs(config: UNetConfig, batch: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shape = (batch, config.image_channels, config.image_size, config.image_size)
    inputs: dict[str, np.ndarray] = {
        "sample": random.standard_normal(shape, np.float32),
        "timestep": np.full(batch, 500, np.float32),
    }
    if config.num_classes:
        inputs["label"] = np.arange(batch, dtype=np.int64) % config.num_classes
    return inputs


def _scheduler() -> Any:
    import diffusers

    make: Any = diffusers.DDIMScheduler
    scheduler: Any = make(num_train_timesteps=1000, beta_schedule="linear")
    scheduler.set_timesteps(_STEPS)
    return scheduler


def _torch_step(network: Any, inputs: dict[str, np.ndarray], *, autocast: bool = False) -> Step:
    scheduler = _scheduler()
    x_t, timestep, *label = (torch.from_numpy(array) for array in inputs.values())
    t = int(scheduler.timesteps[_STEPS // 2])

    def step() -> Any:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            prediction = network(x_t, timestep, *label)
        with torch.inference_mode():
            return scheduler.step(prediction.float(), t, x_t).prev_sample

    return step


def _diffusers_step(network: Any, inputs: dict[str, np.ndarray], *, labelled: bool) -> Step:
    scheduler = _scheduler()
    x_t = torch.from_numpy(inputs["sample"])
    t = int(scheduler.timesteps[_STEPS // 2])
    words = {"class_labels": torch.from_numpy(inputs["label"])} if labelled else {}

    def step() -> Any:
        with torch.no_grad():
            prediction = network(x_t, t, **words).sample
            return scheduler.step(prediction, t, x_t, eta=0.0, use_clipped_model_output=True)

    return step


def _compiled(network: Any) -> Any:
    import torch._inductor.config as inductor

    inductor.freezing = True
    torch._dynamo.reset()
    return torch.compile(network, dynamic=False)


def _ort_step(graph: bytes, inputs: dict[str, np.ndarray], threads: int) -> Step:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, inputs)


def _openvino_step(
    graph: bytes, inputs: dict[str, np.ndarray], threads: int, precision: str
) -> Step:
    import openvino

    core = openvino.Core()
    model = core.read_model(graph, b"")
    model.reshape({name: list(array.shape) for name, array in inputs.items()})
    wanted = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
    request = core.compile_model(
        model, "CPU", {**wanted, "PERFORMANCE_HINT": "LATENCY"}
    ).create_infer_request()
    return lambda: request.infer(inputs, share_inputs=True, share_outputs=True)
