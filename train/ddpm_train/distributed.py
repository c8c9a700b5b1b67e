"""Data-parallel training under ``torchrun``: who this process is, and what all agree on.

Gradients travel over NCCL between GPUs and gloo between CPUs. What the loop decides from (stop now?
what was the loss?) travels over a second gloo group, so that a GPU is never waited for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ddpm_runtime.errors import ConfigurationError

__all__ = ["Processes", "process_group"]


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes of this run, one of which is this one."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    control: Any = None

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def largest(self, value: int) -> int:
        """The largest ``value`` of any process."""
        if self.world_size == 1:
            return value
        result = torch.tensor(value)
        dist.all_reduce(result, dist.ReduceOp.MAX, group=self.control)
        return int(result)

    def mean(self, value: float) -> float:
        """The mean of ``value`` over the processes."""
        if self.world_size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return float(total) / self.world_size

    def average_gradients(self, network: nn.Module) -> None:
        """Replace every gradient by its mean over the processes, in one exchange."""
        if self.world_size == 1:
            return
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        joined = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(joined)
        joined /= self.world_size
        parts = torch.split(joined, [gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


@contextmanager
def process_group(device_type: str) -> Iterator[Processes]:
    """Join the processes that ``torchrun`` started; alone if it did not.

    Args:
        device_type: "cpu" (gloo) or "cuda" (NCCL).

    Raises:
        ConfigurationError: torchrun's environment is incomplete.
    """
    world_size = _environment_number("WORLD_SIZE", 1)
    if world_size == 1:
        yield Processes()
        return
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    try:
        yield Processes(
            rank=dist.get_rank(),
            local_rank=_environment_number("LOCAL_RANK", 0),
            world_size=world_size,
            control=dist.new_group(backend="gloo"),
        )
    finally:
        dist.destroy_process_group()


def _environment_number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise ConfigurationError(
            f"the environment variable {name} is {text!r}, not a whole number. Start several "
            "processes with: torchrun --nproc-per-node N -m ddpm_train ..."
        )
    return int(text)
