"""Everything that can be asked of an engine, in one place: defaults, meaning, refusals.

Settings            what a person asks for, all optional
lane_requests(...)  → what each lane is started with
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bundle import Image, Manifest, Network
from .errors import ConfigurationError, choose
from .images import from_uint8
from .lanes import Known
from .noise import MAX_SEED, noise
from .program import SamplerProgram

__all__ = ["Label", "Settings", "lane_requests", "with_changes"]

Float = NDArray[np.float32]
Label = int | str | Sequence[int | str] | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Settings:
    """How to sample; give any of these by name to :meth:`~ddpm_runtime.Engine.sample`.

    Args:
        seed: in [0, 2⁶⁴).
        first_index: number of the first image; image i of a seed never changes.
        sampler: a name or alias from ``ddpm-run --list-samplers``; None means the bundle's default.
        steps: sampler steps, in [1, T]; None means the bundle's default for its default sampler,
            and what the sampler recommends for another.
        eta: DDIM's η (Song et al. eq. 16), in [0, 1].
        spacing: which timesteps to visit; None means the bundle's default for its default sampler,
            and what the sampler recommends for another.
        clip_denoised: clip predicted clean images to [−1, 1]; None means the bundle's default.
        sampler_options: the sampler's other options by name.
        label: class by number or name, one for all or one an image; "all" deals the classes out
            by index; None means no class.
        guidance_scale: classifier-free guidance, ≥ 0; 1 is off; None means the bundle's default
            when labels are given.
        guidance_interval: (lowest, highest) timestep at which guidance acts, both included; None
            means everywhere. Source: Kynkäänniemi et al., arXiv 2404.07724.
        image: one image for all or one each: uint8 (H, W, C) or float32 (C, H, W) in [−1, 1], with
            a leading n for one each. Start from it (``strength``), or keep part of it (``mask``).
        strength: how much of the chain to run from ``image``, in (0, 1]; 1 starts from pure noise.
            Source: Meng et al. (SDEdit), arXiv 2108.01073 Algorithm 1.
        mask: (H, W) in [0, 1], 1 where ``image`` is to be kept; the rest is painted in.
        x_T: (n, C, H, W) float32 to start from instead of the seed's noise; see ``Engine.encode``.
        cache_interval: evaluate the whole network once every so many evaluations, and between only
            its outer layers, on features kept from the last; 1 or None is off. Lossy; for bundles
            exported with --step-cache. Source: Ma et al., arXiv 2312.00858.
        batch_size: images in flight at once, ≥ 1; changes speed and memory, never an image.
        output: "uint8" gives (n, H, W, C); "float32" gives (n, C, H, W), nominally in [−1, 1].
        on_step: called with a :class:`~ddpm_runtime.StepEvent` after every row.
    """

    seed: int = 0
    first_index: int = 0
    sampler: str | None = None
    steps: int | None = None
    eta: float | None = None
    spacing: str | None = None
    clip_denoised: bool | None = None
    sampler_options: Mapping[str, Any] = field(default_factory=dict)
    label: Label = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    image: NDArray[Any] | None = None
    strength: float | None = None
    mask: NDArray[Any] | None = None
    x_T: Float | None = None  # noqa: N815
    cache_interval: int | None = None
    batch_size: int | None = None
    output: str = "uint8"
    on_step: Callable[[Any], None] | None = None


def with_changes(settings: Settings | None, changes: Mapping[str, Any]) -> Settings:
    """Settings with some of them changed by name.

    Raises:
        ConfigurationError: a name that is no setting.
    """
    names = [one.name for one in fields(Settings)]
    for name in changes:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigurationError(f"{name!r} is no setting; possible: {', '.join(names)}.{hint}")
    return replace(settings or Settings(), **changes)


def lane_requests(
    settings: Settings, n: int, manifest: Manifest, program: SamplerProgram
) -> Iterator[dict[str, Any]]:
    """What each of n lanes is started with. Everything is checked before this returns.

    Args:
        settings: what was asked.
        n: images, ≥ 1.
        manifest: of the bundle.
        program: compiled from the same settings.

    Returns:
        Keyword arguments of ``HostLanes.start``, one mapping an image, made when it is needed.

    Raises:
        ConfigurationError: a bad value or an impossible combination.
    """
    _check_ranges(settings, n)
    labels = _labels(settings, n, manifest.network)
    scale = _guidance_scale(settings, labels, manifest)
    images = _images(settings, n, manifest.image)
    mask = _mask(settings, manifest.image)
    starts = _starts(settings, n, manifest.image)

    def request(i: int) -> dict[str, Any]:
        index = settings.first_index + i
        initial = None if starts is None else starts[i] * np.float32(program.initial_scale)
        known = None
        if images is not None and mask is not None:
            known = Known(image=images[i % len(images)], mask=mask)
        if images is not None and settings.strength not in (None, 1.0):
            image = images[i % len(images)]
            z = noise(settings.seed, index, 0, image.size).reshape(image.shape)
            table = program.table
            initial = table.signal[0] * image + table.noise[0] * z
        return {
            "seed": settings.seed,
            "index": index,
            "label": labels[i],
            "guidance_scale": scale,
            "initial": initial,
            "known": known,
        }

    return map(request, range(n))


def _check_ranges(settings: Settings, n: int) -> None:
    if n < 1:
        raise ConfigurationError(f"the number of images must be ≥ 1; got {n}.")
    if not (0 <= settings.seed <= MAX_SEED and 0 <= settings.first_index <= MAX_SEED - n + 1):
        raise ConfigurationError(
            f"seed and every index must lie in [0, 2^64); got seed={settings.seed}, "
            f"first_index={settings.first_index} for {n} images."
        )
    if settings.batch_size is not None and settings.batch_size < 1:
        raise ConfigurationError(f"batch size must be ≥ 1; got {settings.batch_size}.")
    choose("output", settings.output, ["uint8", "float32"])


# --- labels and guidance -----------------------------------------------------------------------


def _labels(settings: Settings, n: int, network: Network) -> list[int | None]:
    """One class number an image, None for none."""
    label, classes = settings.label, network.num_classes
    if label is None:
        return [None] * n
    if not classes:
        raise ConfigurationError(
            f"label={label!r} was asked of an unconditional network; leave label out."
        )
    if isinstance(label, str) and label == "all":
        return [(settings.first_index + i) % classes for i in range(n)]
    if isinstance(label, (int, str, np.integer)):
        return [_class_number(label, network)] * n
    labels: list[int | None] = [_class_number(one, network) for one in label]
    if len(labels) != n:
        raise ConfigurationError(
            f"{len(labels)} labels for {n} images; give one for all, or one an image."
        )
    return labels


def _class_number(label: int | str, network: Network) -> int:
    names = [name.casefold() for name in network.class_names]
    if isinstance(label, str) and not label.lstrip("-").isdigit():
        if not names:
            raise ConfigurationError(
                f"class {label!r} was asked by name, but this engine names no classes; "
                f"use a number from 0 to {network.num_classes - 1}."
            )
        return names.index(choose("class", label.casefold(), names))
    number = int(label)
    if not 0 <= number < network.num_classes:
        known = f" ({', '.join(network.class_names)})" if names else ""
        raise ConfigurationError(
            f"class {number} was asked; this network has classes 0 to "
            f"{network.num_classes - 1}{known}."
        )
    return number


def _guidance_scale(settings: Settings, labels: list[int | None], manifest: Manifest) -> float:
    asked = settings.guidance_scale
    if labels[0] is None:
        if asked not in (None, 1.0):
            raise ConfigurationError(
                f"guidance_scale={asked} needs a class to guide towards; give label, "
                "or leave guidance_scale at 1 (off)."
            )
        return 1.0
    scale = manifest.defaults.guidance_scale if asked is None else asked
    if not np.isfinite(scale) or scale < 0:
        raise ConfigurationError(
            f"guidance_scale must be a finite number ≥ 0 (1 is off); got {scale}."
        )
    return float(scale)


# --- images to start from ----------------------------------------------------------------------


def _images(settings: Settings, n: int, image: Image) -> Float | None:
    """(1 or n, C, H, W) float32, or None."""
    if settings.image is None:
        for name in ("strength", "mask"):
            if getattr(settings, name) is not None:
                raise ConfigurationError(f"{name} needs an image to start from; give image.")
        return None
    if settings.strength is None and settings.mask is None:
        raise ConfigurationError(
            "image needs strength (start from it) or mask (keep part of it); give one of them."
        )
    if settings.x_T is not None:
        raise ConfigurationError("give image or x_T to start from, not both.")
    return checked_images(settings.image, image, counts=(1, n))


def checked_images(images: NDArray[Any], image: Image, *, counts: Sequence[int]) -> Float:
    """Bring images to (N, C, H, W) float32 in [−1, 1].

    Args:
        images: uint8 (N, H, W, C) or float32 (N, C, H, W) in [−1, 1]; N may be left out for one.
        image: the engine's shape.
        counts: how many are acceptable.

    Raises:
        ConfigurationError: another shape, count or type, or values outside [−1, 1].
    """
    array = np.asarray(images)
    shape: tuple[int, ...] = (image.channels, image.height, image.width)
    if array.dtype == np.uint8:
        array = from_uint8(array) if array.ndim in (3, 4) else array
    elif array.dtype != np.float32:
        raise ConfigurationError(f"images must be uint8 or float32; got {array.dtype}.")
    array = array[None] if array.ndim == 3 else array
    if array.shape[1:] != shape or len(array) not in counts:
        wanted = " or ".join(str(count) for count in sorted(set(counts)))
        raise ConfigurationError(
            f"this engine's images are uint8 (H, W, C) = ({image.height}, {image.width}, "
            f"{image.channels}) or float32 (C, H, W) = {shape}, {wanted} of them; "
            f"got {np.asarray(images).dtype} {np.asarray(images).shape}."
        )
    if not (np.abs(array) <= 1.0).all():
        raise ConfigurationError("float32 images must lie in [−1, 1], without NaN.")
    return array.astype(np.float32, copy=False)


def _mask(settings: Settings, image: Image) -> Float | None:
    """(C, H, W) float32, or None."""
    if settings.mask is None:
        return None
    mask = np.asarray(settings.mask, dtype=np.float32)
    if mask.shape != (image.height, image.width) or not ((mask >= 0) & (mask <= 1)).all():
        raise ConfigurationError(
            f"mask must be ({image.height}, {image.width}) with values in [0, 1], 1 where the "
            f"image is kept; got shape {mask.shape}."
        )
    return np.repeat(mask[None], image.channels, axis=0)


def _starts(settings: Settings, n: int, image: Image) -> Float | None:
    if settings.x_T is None:
        return None
    x_T = np.asarray(settings.x_T, dtype=np.float32)
    shape = (n, image.channels, image.height, image.width)
    if x_T.shape != shape or not np.isfinite(x_T).all():
        raise ConfigurationError(f"x_T must be {shape} finite numbers; got shape {x_T.shape}.")
    return x_T
