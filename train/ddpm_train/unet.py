"""The U-Net of Ho et al. (DDPM, arXiv 2006.11239, appendix B), readable top to bottom.

    time embedding ─┐
    image ─ conv ─▶ down: [residual (+ attention)] × blocks, halve ─▶ … ─▶ middle: residual,
    attention, residual ─▶ up: [residual on the skip (+ attention)] × (blocks + 1), double ─▶ …
    ─▶ norm, SiLU, conv ─▶ prediction

Ho et al.'s CIFAR-10 network is ``UNetConfig(image_size=32, image_channels=3)``: 35.7 M parameters.
Labels, when ``num_classes > 0``, add to the time embedding; label ``num_classes`` means "no class"
and is what classifier-free guidance evaluates.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ddpm_runtime.errors import ConfigurationError

__all__ = ["UNet", "UNetConfig"]


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The shape of a U-Net; every field is a plain JSON value.

    Args:
        image_size: height and width in pixels; divisible by 2^(levels − 1).
        image_channels: 1 for grey, 3 for colour.
        out_channels: channels predicted; None means ``image_channels``; twice as many for a
            learned variance.
        channels: feature channels of the first level; divisible by ``norm_groups``.
        channel_multipliers: feature channels of each level over ``channels``.
        residual_blocks: residual blocks a level.
        attention_resolutions: heights at which self-attention follows each residual block.
        attention_heads: heads of every self-attention.
        dropout: probability inside residual blocks, while training.
        num_classes: 0 for an unconditional network.
        norm_groups: groups of every GroupNorm.
    """

    image_size: int
    image_channels: int
    out_channels: int | None = None
    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 2)
    residual_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    attention_heads: int = 1
    dropout: float = 0.1
    num_classes: int = 0
    norm_groups: int = 32

    def __post_init__(self) -> None:
        # JSON gives lists; keep the config hashable and comparable.
        object.__setattr__(self, "channel_multipliers", tuple(self.channel_multipliers))
        object.__setattr__(self, "attention_resolutions", tuple(self.attention_resolutions))
        halvings = len(self.channel_multipliers) - 1
        if not self.channel_multipliers or self.image_size % 2**halvings:
            raise ConfigurationError(
                f"image_size {self.image_size} cannot be halved {halvings} times; use a size "
                f"divisible by {2**halvings} or fewer channel_multipliers."
            )
        if self.channels % self.norm_groups:
            raise ConfigurationError(
                f"channels={self.channels} must be divisible by norm_groups={self.norm_groups}."
            )
        if self.channels % (2 * self.attention_heads):
            raise ConfigurationError(
                f"channels={self.channels} must be divisible by 2·attention_heads="
                f"{2 * self.attention_heads}."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigurationError(f"dropout must lie in [0, 1); got {self.dropout}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the inverse of ``UNetConfig(**values)``."""
        return asdict(self)


class UNet(nn.Module):
    """Predicts ε, x0 or v of a noisy image.

    Shapes: ``forward(sample (N, C, H, W) float, timestep (N,) float, label (N,) int64 | None)``
    gives ``(N, out_channels, H, W)`` in the dtype of the weights. Timesteps may be fractional.
    Labels lie in [0, num_classes]; ``num_classes`` is "no class"; unconditional networks ignore
    the argument.
    """

    frequencies: Tensor

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        channels, embedding = config.channels, 4 * config.channels
        widths = [channels * multiplier for multiplier in config.channel_multipliers]

        self.time_embedding = nn.Sequential(
            nn.Linear(channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        # a buffer, not a computation: exporters would fold exp() with a library of their own
        self.register_buffer("frequencies", sinusoidal_frequencies(channels), persistent=False)
        if config.num_classes:
            self.label_embedding = nn.Embedding(config.num_classes + 1, embedding)

        self.conv_in = nn.Conv2d(config.image_channels, channels, 3, padding=1)
        size, current, skips = config.image_size, channels, [channels]
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            for _ in range(config.residual_blocks):
                self.down.append(Stage(config, current, width, size))
                current = width
                skips.append(current)
            if level < len(widths) - 1:
                self.down.append(Downsample(current))
                size //= 2
                skips.append(current)

        self.middle = nn.ModuleList(
            [
                ResidualBlock(config, current, current),
                SelfAttention(config, current),
                ResidualBlock(config, current, current),
            ]
        )

        self.up = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(config.residual_blocks + 1):
                self.up.append(Stage(config, current + skips.pop(), width, size))
                current = width
            if level:
                self.up.append(Upsample(current))
                size *= 2

        self.norm_out = nn.GroupNorm(config.norm_groups, current, eps=1e-6)
        self.conv_out = _zeroed(
            nn.Conv2d(current, config.out_channels or config.image_channels, 3, padding=1)
        )

    def forward(self, sample: Tensor, timestep: Tensor, label: Tensor | None = None) -> Tensor:
        """Predict; see the class for shapes."""
        embedding = self.time_embedding(
            sinusoidal_embedding(timestep, self.frequencies).to(self.conv_in.weight.dtype)
        )
        if self.config.num_classes:
            if label is None:
                raise ConfigurationError(
                    f"this network has {self.config.num_classes} classes: pass label, "
                    f"{self.config.num_classes} for none."
                )
            embedding = embedding + self.label_embedding(label)
        embedding = F.silu(embedding)

        hidden = self.conv_in(sample)
        skips = [hidden]
        for module in self.down:
            hidden = module(hidden, embedding)
            skips.append(hidden)
        first, attention, second = self.middle
        hidden = second(attention(first(hidden, embedding)), embedding)
        for module in self.up:
            if isinstance(module, Stage):
                hidden = torch.cat([hidden, skips.pop()], dim=1)
            hidden = module(hidden, embedding)
        return self.conv_out(F.silu(self.norm_out(hidden)))


class Stage(nn.Module):
    """A residual block, followed by self-attention at the resolutions that have it."""

    def __init__(self, config: UNetConfig, channels_in: int, channels_out: int, size: int) -> None:
        super().__init__()
        self.residual = ResidualBlock(config, channels_in, channels_out)
        attends = size in config.attention_resolutions
        self.attention = SelfAttention(config, channels_out) if attends else nn.Identity()

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        return self.attention(self.residual(hidden, embedding))


class ResidualBlock(nn.Module):
    """norm, SiLU, conv, + embedding, norm, SiLU, dropout, conv, + shortcut."""

    def __init__(self, config: UNetConfig, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(config.norm_groups, channels_in, eps=1e-6)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.embedding = nn.Linear(4 * config.channels, channels_out)
        self.norm2 = nn.GroupNorm(config.norm_groups, channels_out, eps=1e-6)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = _zeroed(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        same = channels_in == channels_out
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        residual = self.conv1(F.silu(self.norm1(hidden)))
        residual = residual + self.embedding(embedding)[:, :, None, None]
        residual = self.conv2(self.dropout(F.silu(self.norm2(residual))))
        return self.shortcut(hidden) + residual


class SelfAttention(nn.Module):
    """Every pixel attends to every pixel: softmax(QKᵀ/√d)·V with a residual connection."""

    def __init__(self, config: UNetConfig, channels: int) -> None:
        super().__init__()
        self.heads = config.attention_heads
        self.norm = nn.GroupNorm(config.norm_groups, channels, eps=1e-6)
        self.query_key_value = nn.Conv2d(channels, 3 * channels, 1)
        self.projection = _zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, hidden: Tensor) -> Tensor:
        batch, channels, height, width = hidden.shape
        qkv = self.query_key_value(self.norm(hidden))
        # (N, heads, d, pixels) each; attention wants (N, heads, pixels, d)
        qkv = qkv.reshape(batch, 3, self.heads, channels // self.heads, height * width)
        query, key, value = qkv.transpose(-1, -2).unbind(1)
        attended = F.scaled_dot_product_attention(query, key, value)
        attended = attended.transpose(-1, -2).reshape(batch, channels, height, width)
        return hidden + self.projection(attended)


class Downsample(nn.Module):
    """Halve height and width with a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, hidden: Tensor, _embedding: Tensor) -> Tensor:
        return self.conv(hidden)


class Upsample(nn.Module):
    """Double height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden: Tensor, _embedding: Tensor) -> Tensor:
        return self.conv(F.interpolate(hidden, scale_factor=2.0, mode="nearest"))


def sinusoidal_frequencies(dimensions: int) -> Tensor:
    """Geometric frequencies from 1 down to 1/10000, (dimensions / 2,) float32.

    Source: Vaswani et al., arXiv 1706.03762 §3.5, with Ho et al.'s spacing (half − 1).
    """
    half = dimensions // 2
    exponents = torch.arange(half, dtype=torch.float32) * (-math.log(10000.0) / max(half - 1, 1))
    return torch.exp(exponents)


def sinusoidal_embedding(timestep: Tensor, frequencies: Tensor) -> Tensor:
    """Sines and cosines of the timestep at each frequency, (N,), (half,) → (N, 2·half).

    Always float32 inside: a bfloat16 timestep could not tell 998 from 999.
    """
    angles = timestep.float()[:, None] * frequencies.float()[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """Start a layer at zero, so that its block starts as the identity (Ho et al., appendix B)."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
