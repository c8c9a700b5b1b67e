"""Seeds for everything random in training, each a pure function of what it is for.

    seed of a draw = BLAKE2b(seed, purpose, step, ...)

So a run that is stopped anywhere and resumed draws exactly what it would have drawn: there is no
generator state to save, and nothing to replay.
"""

from __future__ import annotations

import hashlib

import torch

__all__ = ["derive_seed", "generator_for"]


def derive_seed(seed: int, purpose: str, *indices: int) -> int:
    """A 63-bit seed that depends on every argument.

    Args:
        seed: the run's seed.
        purpose: what is drawn ("order", "noise", ...): different purposes never share a stream.
        *indices: which draw of that purpose (an epoch, a step, a rank).

    Returns:
        A whole number in [0, 2^63).
    """
    text = "/".join([str(seed), purpose, *map(str, indices)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator_for(
    seed: int, purpose: str, *indices: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A fresh torch generator on ``device``, seeded by :func:`derive_seed`."""
    generator = torch.Generator(device=device)
    generator.manual_seed(derive_seed(seed, purpose, *indices))
    return generator
