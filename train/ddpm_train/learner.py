"""The state of a run and the one step that changes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ddpm_runtime.errors import CheckpointError
from ddpm_runtime.schedule import make_schedule

from .batches import Batch
from .config import TrainConfig
from .device import uses_bf16
from .diffusion import ForwardProcess, training_loss
from .distributed import Processes
from .ema import MovingAverage
from .learning_rate import learning_rate_at
from .preview import sample_images
from .seeds import derive_seed
from .unet import UNet, UNetConfig

__all__ = ["Learner"]


class Learner:
    """A network, its moving average and its optimiser, after ``step`` steps.

    Args:
        config: the recipe.
        network_config: the shape of the network.
        device: where to compute.
        processes: who shares every batch.
    """

    def __init__(
        self,
        config: TrainConfig,
        network_config: UNetConfig,
        device: torch.device,
        processes: Processes,
    ) -> None:
        self.config, self.device, self.step = config, device, 0
        self._processes = processes
        torch.manual_seed(derive_seed(config.run.seed, "weights"))
        self.network = UNet(network_config).to(device)
        if config.run.channels_last:
            self.network = self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = MovingAverage(self.network, config.optimization.ema_decay)
        self.optimizer = _adam(self.network, config)
        self.schedule = make_schedule(**config.diffusion.schedule)
        self._forward_process = ForwardProcess(
            self.schedule, config.diffusion.prediction_type, device
        )
        self._bf16 = uses_bf16(config.run, device)

    def take_step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """One optimiser step on this process's share of a batch.

        Returns:
            The loss of this share and the norm of the gradient before clipping, both () float32
            on the device.
        """
        settings, rank = self.config.optimization, self._processes.rank
        torch.manual_seed(derive_seed(self.config.run.seed, "dropout", self.step, rank))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(self.step, settings)
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for part in batch.split(settings.accumulation):
            loss = self._loss(part) / settings.accumulation
            torch.autograd.backward(loss)
            total += loss.detach()
        self._processes.average_gradients(self.network)
        norm = nn.utils.clip_grad_norm_(
            self.network.parameters(), settings.gradient_clip or float("inf")
        )
        self.optimizer.step()
        self.average.update(self.step)
        self.step += 1
        return total, norm

    def _loss(self, part: Batch) -> Tensor:
        """L_simple of Ho et al., arXiv 2006.11239 Algorithm 1, lines 2 to 5."""
        settings = self.config.diffusion
        x_t = self._forward_process.noised(part.x_0, part.timesteps, part.epsilon)
        if self.config.run.channels_last:
            x_t = x_t.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
            prediction = self.network(x_t, part.timesteps.float(), part.labels)
        target = self._forward_process.target(part.x_0, part.timesteps, part.epsilon)
        return training_loss(settings.loss, prediction, target, settings.huber_delta)

    def sample(self, count: int) -> NDArray[np.uint8]:
        """Images 0 … count − 1 of seed 0 by the moving average: (count, H, W, C) uint8."""
        return sample_images(
            self.network,
            self.average.weights,
            self.schedule,
            self.config.diffusion.prediction_type,
            count=count,
            bf16=self._bf16,
        )

    def state(self) -> dict[str, Any]:
        """Everything that changes while training; tensors are not copied."""
        return {
            "step": self.step,
            "weights": self.network.state_dict(),
            "average": self.average.weights,
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state(self, values: dict[str, Any]) -> None:
        """Continue from what :meth:`state` gave.

        Raises:
            CheckpointError: the state is not of this network.
        """
        try:
            self.network.load_state_dict(values["weights"])
            self.average.load(values["average"])
            self.optimizer.load_state_dict(values["optimizer"])
            self.step = int(values["step"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"the saved state does not fit this network: {error}") from error


def _adam(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Adam; weight decay, where asked for, spares biases and norms (vectors)."""
    settings = config.optimization
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)
