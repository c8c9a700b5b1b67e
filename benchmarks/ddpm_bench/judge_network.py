"""The network behind the judge: a small residual classifier of Fashion-MNIST garments (torch).

    uint8 (N, 28, 28, 1) ─▶ standardise ─▶ conv 32 ─▶ halve ─▶ conv 64, residual 64
    ─▶ halve ─▶ conv 128, residual 128 ─▶ mean over pixels = features (N, 128) ─▶ logits (N, 10)

Only :mod:`ddpm_bench.judge_train` needs this file; the shipped judge is an ONNX file that
:mod:`ddpm_bench.judge` runs without PyTorch. Standardising is inside the graph, so the input is
exactly the bytes an image file holds and cannot be scaled wrongly by a caller.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

__all__ = ["FEATURES", "JudgeNetwork"]

FEATURES = 128

# Mean and standard deviation of the 60,000 training images over all pixels, in [0, 1].
TRAIN_MEAN = 0.2860
TRAIN_STD = 0.3530


class JudgeNetwork(nn.Module):
    """Garment classifier with its penultimate activations exposed.

    Shapes: ``forward(images (N, 28, 28, 1) uint8)`` gives ``(features (N, 128) float32 ≥ 0,
    logits (N, 10) float32)``.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = Convolution(1, 32)
        self.widen = Convolution(32, 64)
        self.middle = Residual(64)
        self.deepen = Convolution(64, FEATURES)
        self.last = Residual(FEATURES)
        self.classify = nn.Linear(FEATURES, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits; see the class for shapes."""
        pixels = images.permute(0, 3, 1, 2).float()
        hidden = (pixels / 255.0 - TRAIN_MEAN) / TRAIN_STD
        hidden = functional.max_pool2d(self.stem(hidden), 2)
        hidden = functional.max_pool2d(self.middle(self.widen(hidden)), 2)
        hidden = self.last(self.deepen(hidden))
        features = hidden.float().mean(dim=(2, 3))
        return features, self.classify(features)


class Convolution(nn.Sequential):
    """3×3 convolution, batch norm, ReLU."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(
            nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
        )


class Residual(nn.Module):
    """Add one 3×3 convolution's result to its input, (N, C, H, W) → (N, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = Convolution(channels, channels)

    def forward(self, hidden: Tensor) -> Tensor:
        """The input plus its convolution."""
        added: Tensor = self.body(hidden)
        return hidden + added
