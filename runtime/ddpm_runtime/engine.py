"""A loaded bundle, ready to sample: what people embed.

    from ddpm_runtime import Engine

    engine = Engine.load("fashion-mnist.engine")
    images = engine.sample(64, seed=0, steps=50, sampler="ddim")       # uint8 (64, 28, 28, 1)

An image is a function of the engine, the sampler's settings, ``seed`` and its index: the same
whatever the batch size, the order, or what else is being sampled.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .backends import BACKENDS, DEVICES, open_backend
from .backends.base import Backend
from .bundle import Bundle, Manifest, read_bundle
from .errors import ConfigurationError, LifecycleError, NonFiniteError, choose
from .images import to_uint8
from .lanes import Finished, HostLanes
from .noise import MAX_SEED
from .program import SamplerProgram
from .samplers import SAMPLERS, build_program

__all__ = ["Engine", "Sample", "StepEvent"]

_log = logging.getLogger("ddpm_runtime")

_LARGEST_BATCH = 64

Label = int | str | Sequence[int | str] | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One finished image.

    Args:
        index: its number under the seed.
        label: its class, None for none.
        image: (H, W, C) uint8, or (C, H, W) float32 when asked for.
    """

    index: int
    label: int | None
    image: NDArray[Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class StepEvent:
    """Progress, after every row.

    Args:
        rows_done: rows done so far over all images asked for.
        rows_total: rows to do in all.
        previews: call it for x_t of the images in flight, (H, W, C) uint8 by index; costs a copy.
    """

    rows_done: int
    rows_total: int
    previews: Callable[[], dict[int, NDArray[np.uint8]]]


class Engine:
    """A diffusion network and everything needed to sample it. Make one with :meth:`load`.

    Methods may be called from several threads at once.
    """

    def __init__(self, bundle: Bundle, backend: Backend, *, reason: str) -> None:
        self._bundle = bundle
        self._backend: Backend | None = backend
        self._reason = reason
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._idle: HostLanes | None = None
        self._programs: dict[str, SamplerProgram] = {}

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        device: str = "auto",
        backend: str = "auto",
        threads: int | None = None,
    ) -> Engine:
        """Load an engine bundle.

        Args:
            path: the ``NAME.engine`` directory that ddpm-export wrote.
            device: one of "auto", "cpu".
            backend: one of "auto", "onnxruntime". "auto" takes what this device has, and
                ``description`` says what it took.
            threads: threads inside an operator; None means the processors this process may use.

        Raises:
            NotABundleError, ManifestError, IntegrityError: see ``bundle.read_bundle``.
            BackendUnavailableError: the inference library is not installed.
            NetworkMismatchError: the network is not the one the manifest describes.
            ConfigurationError: unknown device or backend.
        """
        choose("device", device, DEVICES)
        choose("backend", backend, ["auto", *BACKENDS])
        bundle = read_bundle(path)
        opened, reason = open_backend(bundle, device=device, backend=backend, threads=threads)
        engine = cls(bundle, opened, reason=reason)
        _log.info("loaded %s on %s", engine.manifest.name, engine.description)
        return engine

    @property
    def manifest(self) -> Manifest:
        """Everything the bundle says of itself."""
        return self._bundle.manifest

    @property
    def description(self) -> str:
        """What runs the network, and why it was chosen."""
        return f"{self._open_backend.description} ({self._reason})"

    @cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of a uint8 image."""
        image = self.manifest.image
        return image.height, image.width, image.channels

    def sample(
        self,
        n: int = 1,
        *,
        seed: int = 0,
        first_index: int = 0,
        sampler: str | None = None,
        steps: int | None = None,
        label: Label = None,
        guidance_scale: float | None = None,
        eta: float | None = None,
        spacing: str | None = None,
        clip_denoised: bool | None = None,
        sampler_options: Mapping[str, Any] | None = None,
        batch_size: int | None = None,
        output: Literal["uint8", "float32"] = "uint8",
        on_step: Callable[[StepEvent], None] | None = None,
    ) -> NDArray[Any]:
        """Draw n images.

        Args:
            n: how many, ≥ 1.
            seed: in [0, 2⁶⁴).
            first_index: number of the first image; image i of a seed never changes.
            sampler: one of :data:`~ddpm_runtime.samplers.SAMPLERS`; None means the default.
            steps: sampler steps, in [1, T]; None means the bundle's default for its default
                sampler, and what the sampler recommends for another.
            label: class by number or name, one for all or one an image; "all" deals the classes
                out by index; None means no class.
            guidance_scale: classifier-free guidance; 1 is off, None the bundle's default when
                labels are given.
            eta: DDIM's η (Song et al. eq. 16), in [0, 1].
            spacing: which timesteps to visit; None means the bundle's default.
            clip_denoised: clip predicted clean images to [−1, 1]; None means the bundle's default.
            sampler_options: the sampler's other options by name.
            batch_size: images in flight at once; changes speed and memory, never an image.
            output: "uint8" gives (n, H, W, C); "float32" gives (n, C, H, W), nominally in [−1, 1].
            on_step: called after every row.

        Returns:
            The images in order of index.

        Raises:
            ConfigurationError: a bad value or an impossible combination.
            NonFiniteError: an image came out with NaN or infinity.
            BackendError: the inference library failed.
            LifecycleError: the engine is closed, or was loaded before a fork.
        """
        samples = self.stream(
            n,
            seed=seed,
            first_index=first_index,
            sampler=sampler,
            steps=steps,
            label=label,
            guidance_scale=guidance_scale,
            eta=eta,
            spacing=spacing,
            clip_denoised=clip_denoised,
            sampler_options=sampler_options,
            batch_size=batch_size,
            output=output,
            on_step=on_step,
        )
        images = {sample.index: sample.image for sample in samples}
        return np.stack([images[first_index + i] for i in range(n)])

    def stream(
        self,
        n: int = 1,
        *,
        seed: int = 0,
        first_index: int = 0,
        sampler: str | None = None,
        steps: int | None = None,
        label: Label = None,
        guidance_scale: float | None = None,
        eta: float | None = None,
        spacing: str | None = None,
        clip_denoised: bool | None = None,
        sampler_options: Mapping[str, Any] | None = None,
        batch_size: int | None = None,
        output: Literal["uint8", "float32"] = "uint8",
        on_step: Callable[[StepEvent], None] | None = None,
    ) -> Iterator[Sample]:
        """Like :meth:`sample`, but images are yielded as they finish. Stop iterating to stop.

        Everything is checked before the first image is begun, and before this returns.
        """
        if n < 1:
            raise ConfigurationError(f"the number of images must be ≥ 1; got {n}.")
        if not (0 <= seed <= MAX_SEED and 0 <= first_index <= MAX_SEED - n + 1):
            raise ConfigurationError(
                f"seed and every index must lie in [0, 2^64); got seed={seed}, "
                f"first_index={first_index} for {n} images."
            )
        choose("output", output, ["uint8", "float32"])
        program = self.program(
            sampler=sampler,
            steps=steps,
            eta=eta,
            spacing=spacing,
            clip_denoised=clip_denoised,
            sampler_options=sampler_options,
        )
        labels = self._labels(label, n, first_index)
        scale = self._guidance_scale(guidance_scale, labels)
        if batch_size is not None and batch_size < 1:
            raise ConfigurationError(f"batch size must be ≥ 1; got {batch_size}.")
        lanes = self._take_lanes(min(n, batch_size or _LARGEST_BATCH))
        requests = iter(
            {"seed": seed, "index": first_index + i, "label": labels[i], "guidance_scale": scale}
            for i in range(n)
        )
        return self._run(lanes, program, requests, n, output, on_step)

    def program(
        self,
        *,
        sampler: str | None = None,
        steps: int | None = None,
        eta: float | None = None,
        spacing: str | None = None,
        clip_denoised: bool | None = None,
        sampler_options: Mapping[str, Any] | None = None,
    ) -> SamplerProgram:
        """Compile a sampler for this network; arguments as in :meth:`sample`.

        Raises:
            ConfigurationError: a bad value or an impossible combination.
        """
        defaults = self.manifest.defaults
        name = choose("sampler", sampler or defaults.sampler, SAMPLERS)
        if steps is None:
            steps = defaults.steps if name == defaults.sampler else SAMPLERS[name].recommended_steps
        options = dict(sampler_options or {})
        if eta is not None:
            options["eta"] = eta
        clip = defaults.clip_denoised if clip_denoised is None else clip_denoised
        arguments = {
            "sampler": name,
            "num_inference_steps": steps,
            "spacing": spacing or defaults.spacing,
            "clip": 1.0 if clip else float("inf"),
            **options,
        }
        key = json.dumps(arguments, sort_keys=True, default=repr)
        if key not in self._programs:
            self._programs[key] = build_program(
                schedule=self._bundle.schedule,
                prediction_type=self.manifest.network.prediction_type,
                **arguments,
            )
        return self._programs[key]

    def close(self) -> None:
        """Release the network. Idempotent; sampling afterwards raises LifecycleError."""
        backend, self._backend, self._idle = self._backend, None, None
        if backend is not None:
            backend.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- the loop ------------------------------------------------------------------------------

    def _run(
        self,
        lanes: HostLanes,
        program: SamplerProgram,
        requests: Iterator[dict[str, Any]],
        n: int,
        output: str,
        on_step: Callable[[StepEvent], None] | None,
    ) -> Iterator[Sample]:
        """Keep the lanes full until every request is done."""
        rows_done = 0
        try:
            while True:
                for request in _at_most(lanes.free, requests):
                    tag = (request["index"], request["label"])
                    lanes.start(program, **request, tag=tag)
                if not lanes.active:
                    break
                rows_done += lanes.active
                finished = lanes.advance()
                if on_step is not None:
                    on_step(
                        StepEvent(
                            rows_done=rows_done,
                            rows_total=n * len(program),
                            previews=partial(_previews, lanes, finished),
                        )
                    )
                for lane in finished:
                    yield _sample(lane, program, output)
        finally:
            lanes.cancel()
            self._give_back_lanes(lanes)

    def _take_lanes(self, capacity: int) -> HostLanes:
        """Lanes of this capacity: the idle ones if they fit, else new ones."""
        backend = self._open_backend
        with self._lock:
            lanes, self._idle = self._idle, None
        if lanes is not None and lanes.capacity == capacity:
            return lanes
        return HostLanes(backend, capacity)

    def _give_back_lanes(self, lanes: HostLanes) -> None:
        with self._lock:
            if self._backend is not None:
                self._idle = lanes

    @property
    def _open_backend(self) -> Backend:
        if self._backend is None:
            raise LifecycleError("this engine is closed; load it again with Engine.load().")
        if os.getpid() != self._process:
            raise LifecycleError(
                "this engine was loaded before the process forked; load it in the child, or start "
                "workers with the 'spawn' method."
            )
        return self._backend

    # --- labels --------------------------------------------------------------------------------

    def _labels(self, label: Label, n: int, first_index: int) -> list[int | None]:
        """One class number an image, None for none."""
        classes = self.manifest.network.num_classes
        if label is None:
            return [None] * n
        if not classes:
            raise ConfigurationError(
                f"label={label!r} was asked of an unconditional network; leave label out."
            )
        if label == "all":
            return [(first_index + i) % classes for i in range(n)]
        if isinstance(label, (int, str, np.integer)):
            return [self._class_number(label)] * n
        labels: list[int | None] = [self._class_number(one) for one in label]
        if len(labels) != n:
            raise ConfigurationError(
                f"{len(labels)} labels for {n} images; give one for all, or one an image."
            )
        return labels

    def _class_number(self, label: int | str) -> int:
        network = self.manifest.network
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

    def _guidance_scale(self, asked: float | None, labels: list[int | None]) -> float:
        if labels[0] is None:
            if asked is not None and asked != 1.0:
                raise ConfigurationError(
                    f"guidance_scale={asked} needs a class to guide towards; give label, "
                    "or leave guidance_scale at 1 (off)."
                )
            return 1.0
        scale = self.manifest.defaults.guidance_scale if asked is None else asked
        if not np.isfinite(scale) or scale < 0:
            raise ConfigurationError(
                f"guidance_scale must be a finite number ≥ 0 (1 is off); got {scale}."
            )
        return float(scale)


def _at_most(count: int, requests: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The next ``count`` requests, or fewer when there are no more."""
    for _, request in zip(range(count), requests, strict=False):
        yield request


def _sample(lane: Finished, program: SamplerProgram, output: str) -> Sample:
    index, label = lane.tag
    if lane.failed_row is not None:
        raise NonFiniteError(
            f"image {index} holds NaN or infinity after row {lane.failed_row} of {len(program)} of "
            f"the {program.sampler} sampler. Turn clip_denoised on, use more steps, or check the "
            "network with ddpm-export's parity report."
        )
    image = to_uint8(lane.image) if output == "uint8" else lane.image
    return Sample(index=index, label=label, image=image)


def _previews(lanes: HostLanes, finished: list[Finished]) -> dict[int, NDArray[np.uint8]]:
    images = lanes.images()
    images.update({lane.tag: lane.image for lane in finished})
    return {index: to_uint8(image) for (index, _), image in images.items()}
