"""What this very machine can do: matrix products and copies a second, measured now.

The same library computes the products as computes networks, so the rate is one that a network's
convolutions could reach: ONNX Runtime for float32 (NumPy as a check), OpenVINO or PyTorch for
bfloat16. The best of several is taken; a limit is not an average.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["copy_gb_per_s", "matmul_gflops"]

_SIZE = 2048
_TRIES = 8
_COPY_BYTES = 256 << 20


def matmul_gflops(threads: int) -> dict[str, float]:
    """GFLOP/s of a 2048³ product, by precision; bf16 only where a library for it is installed."""
    rates = {"fp32": _best(_numpy_product())}
    try:
        import torch
    except ImportError:
        return rates
    torch.set_num_threads(threads)
    with torch.inference_mode():
        rates["fp32"] = max(rates["fp32"], _best(_torch_product(torch, torch.float32)))
        rates["bf16"] = _best(_torch_product(torch, torch.bfloat16))
    return rates


def copy_gb_per_s() -> float:
    """GB/s read plus written by a copy that no cache holds, on one thread."""
    source = np.ones(_COPY_BYTES // 4, np.float32)
    target = np.empty_like(source)
    seconds = _least_seconds(lambda: np.copyto(target, source))
    return 2 * _COPY_BYTES / seconds / 1e9


def _best(product: Callable[[], Any]) -> float:
    return 2 * _SIZE**3 / _least_seconds(product) / 1e9


def _least_seconds(work: Callable[[], Any]) -> float:
    work()
    best = float("inf")
    for _ in range(_TRIES):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return best


def _numpy_product() -> Callable[[], Any]:
    matrix = np.ones((_SIZE, _SIZE), np.float32)
    out = np.empty_like(matrix)
    return lambda: np.matmul(matrix, matrix, out=out)


def _torch_product(torch: Any, dtype: Any) -> Callable[[], Any]:
    matrix = torch.ones(_SIZE, _SIZE, dtype=dtype)
    return lambda: torch.mm(matrix, matrix)
