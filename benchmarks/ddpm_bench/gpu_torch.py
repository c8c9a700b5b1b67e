"""The same batch by PyTorch on the same GPU: same weights, same x_T, same numbers in every row.

A row of a sampler with one register and no noise (DDIM with eta 0) is, from the program's table,

    m  = network(input_scale · x, t, label)
    x0 = clip(x0_from_x · x + x0_from_m · m)
    x' = w_x · x + w_m · m + w_0 · x0

PyTorch is given every advantage that changes no picture: x_T lies on the device before the clock
starts, layers in bfloat16 have bfloat16 weights and channels-last memory, cuDNN searches, and the
compiled row (network and update in one graph) is replayed as a CUDA graph.
"""

from __future__ import annotations

import contextlib
import copy
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm_runtime.errors import BackendUnavailableError, ConfigurationError, missing_extra
from ddpm_runtime.noise import noise
from ddpm_runtime.program import SamplerProgram

__all__ = ["TORCH_WAYS", "TorchBatch", "TorchWay", "cuda_torch"]

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class TorchWay:
    """A way to run a network in PyTorch.

    Args:
        name: part of a case's id.
        precision: "fp32", or "bf16": convolutions and linear layers, by autocast.
        mode: of ``torch.compile``; None is eager.
        guess_s: how long it takes to get ready, before one has been seen.
    """

    name: str
    precision: str
    mode: str | None = None
    guess_s: float = 5.0


TORCH_WAYS = (
    TorchWay(name="torch-eager", precision="fp32"),
    TorchWay(name="torch-eager", precision="bf16"),
    TorchWay(name="torch-compile", precision="bf16", mode="max-autotune", guess_s=60.0),
)


def cuda_torch() -> Any:
    """PyTorch with a GPU.

    Raises:
        BackendUnavailableError: it is not installed, is a build without CUDA, or sees no GPU.
    """
    try:
        import torch
    except ImportError as error:
        raise missing_extra("torch", "time PyTorch on the GPU", "bench") from error
    if torch.version.cuda is None:
        raise BackendUnavailableError(
            f"torch {torch.__version__} is a build without CUDA; install one from "
            "https://pytorch.org to time PyTorch beside us."
        )
    if not torch.cuda.is_available():
        raise BackendUnavailableError(
            f"torch {torch.__version__} sees no GPU; check CUDA_VISIBLE_DEVICES and nvidia-smi."
        )
    return torch


class TorchBatch:
    """Draws the same batch again and again in PyTorch; ``gpu_ours.OurBatch``'s counterpart.

    Args:
        torch: the module.
        network: our U-Net in PyTorch; it is copied.
        way: how to run it.
        program: the sampler: one register, no noise.
        image: (C, H, W).
        batch: images.
        num_classes: 0 for an unconditional network.
        device: of PyTorch.

    Raises:
        ConfigurationError: the sampler keeps history or draws noise.
    """

    def __init__(
        self, torch: Any, network: Any, way: TorchWay, program: SamplerProgram, *,
        image: tuple[int, int, int], batch: int, num_classes: int, device: str = "cuda",
    ) -> None:  # fmt: skip
        began = time.perf_counter()
        self._torch, self._device, self._compiled = torch, device, way.mode is not None
        self._table = torch.from_numpy(_columns(program)).to(device)
        size = int(np.prod(image))
        start = np.stack([noise(0, index, 0, size) for index in range(batch)])
        start *= np.float32(program.initial_scale)
        self._start = torch.from_numpy(start.reshape(batch, *image)).to(device)
        self._x_t = torch.empty_like(self._start)
        labels = np.arange(batch, dtype=np.int64) % max(1, num_classes)
        self._label = [torch.from_numpy(labels).to(device)] if num_classes else []
        row = _row(torch, _prepared(torch, network, way, device), way.precision, device)
        if way.mode is not None:
            torch._dynamo.reset()
            row = torch.compile(row, mode=way.mode, dynamic=False)
        self._row = row
        opened = time.perf_counter()
        self()
        built = time.perf_counter()
        compiled_ms = 1e3 * (built - opened) if self._compiled else None
        if self._compiled:
            self()  # the first batch with everything compiled
        self.setup: dict[str, float | None] = {
            "open_ms": 1e3 * (opened - began),
            "build_ms": compiled_ms,
            "load_ms": None,
            "first_batch_ms": 1e3 * (time.perf_counter() - (built if self._compiled else opened)),
        }
        how = f'torch.compile(mode="{way.mode}")' if way.mode else "eager"
        self.description = f"PyTorch {torch.__version__}, {how}, {device}, {way.precision}"

    def __call__(self) -> Pixels:
        """One batch, (N, H, W, C) uint8."""
        torch = self._torch
        with torch.no_grad():
            self._x_t.copy_(self._start)
            for numbers in self._table:
                if self._compiled:
                    torch.compiler.cudagraph_mark_step_begin()
                # into memory that stays: the next replay overwrites what a CUDA graph returned
                self._x_t.copy_(self._row(self._x_t, numbers, *self._label))
            pixels = ((self._x_t.clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
            found: Pixels = pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return found

    def close(self) -> None:
        """Release the memory. Idempotent."""
        self._row = self._table = self._start = self._x_t = None
        self._label = []
        if self._compiled:
            self._torch._dynamo.reset()
        if self._device == "cuda":
            self._torch.cuda.empty_cache()


def _columns(program: SamplerProgram) -> NDArray[np.float32]:
    """(rows, 8): timestep, input_scale, x0_from_x, x0_from_m, clip, w_x, w_m, w_0."""
    table = program.table
    if program.registers != 1 or table.weights[:, 0, -1].any() or not table.evaluates.all():
        raise ConfigurationError(
            f"PyTorch is timed with a sampler of one register and no noise, like ddim; the "
            f"{program.sampler} program is not one."
        )
    columns = ("timesteps", "input_scale", "x0_from_x", "x0_from_m", "clip")
    found = [*(getattr(table, name) for name in columns), *table.weights[:, 0, :3].T]
    return np.ascontiguousarray(np.stack(found, axis=1), np.float32)


def _prepared(torch: Any, network: Any, way: TorchWay, device: str) -> Any:
    """A copy on the device, in the way's precision and memory format."""
    made = copy.deepcopy(network).eval().to(device)
    if device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if way.precision == "bf16":
        made = made.to(memory_format=torch.channels_last)
        for module in made.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                module.to(torch.bfloat16)
    return made


def _row(torch: Any, network: Any, precision: str, device: str) -> Any:
    lowered = precision == "bf16"

    def row(x_t: Any, numbers: Any, *label: Any) -> Any:
        t, input_scale, x0_from_x, x0_from_m, clip, w_x, w_m, w_0 = numbers.unbind()
        inside = torch.autocast(device, torch.bfloat16) if lowered else contextlib.nullcontext()
        with inside:
            m = network(input_scale * x_t, t.expand(len(x_t)), *label)
        m = m.float()
        x_0 = torch.minimum(torch.maximum(x0_from_x * x_t + x0_from_m * m, -clip), clip)
        return w_x * x_t + w_m * m + w_0 * x_0

    return row
