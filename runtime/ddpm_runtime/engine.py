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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle, Manifest, read_bundle
from .errors import LifecycleError, NonFiniteError
from .images import to_uint8
from .lane_pool import LanePool
from .program import SamplerProgram
from .runner import FinishedLane, Lanes, Opening, Runner, open_runner
from .samplers import SAMPLERS, build_program, resolve_sampler
from .samplers.inversion import build_inversion
from .settings import Label, Settings, checked_images, lane_requests, with_changes
from .step_cache import with_step_cache

__all__ = ["Engine", "Sample", "StepEvent"]

_log = logging.getLogger("ddpm_runtime")

_LARGEST_BATCH = 64

Float = NDArray[np.float32]


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
    """Progress: after every row, or on a CUDA device after about a fortieth of them.

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

    def __init__(self, bundle: Bundle, runner: Runner) -> None:
        self._bundle = bundle
        self._runner = runner
        self._pool = LanePool(runner)
        self._process = os.getpid()
        self._programs: dict[str, SamplerProgram] = {}

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        device: str = "auto",
        backend: str = "auto",
        threads: int | None = None,
        precision: str = "auto",
        lanes: int | None = None,
        graph_level: str = "auto",
        plan: str | os.PathLike[str] | None = None,
        trust_plan: bool = False,
    ) -> Engine:
        """Load an engine bundle.

        Args:
            path: the ``NAME.engine`` directory that ddpm-export wrote.
            device: "cpu", "cuda", "cuda:1", ..., or "auto": a CUDA device if there is one and a
                library to use it, else the processor. $DDPM_DEVICE=cpu makes "auto" the processor.
            backend: on the processor "onnxruntime", "openvino", or "fastest", which measures (about
                a second, once); on a CUDA device "tensorrt", "tensorrt_rtx" or "onnxruntime".
                "auto" takes the first that is installed, so that a machine always draws the same
                bits; ``description`` says what was taken and why.
            threads: how many work at once; None means the processors this process may use.
            precision: "auto" is what the bundle was exported in. "fp32" or "bf16" is for the
                processor: bfloat16 is faster there, and its images differ.
            lanes: images to evaluate at once. On a CUDA device always exactly so many, the rest
                being padding: an image then has the same bits in every company. None means as many
                as a call asks for, and on a CUDA device the last bits may differ with that number.
            graph_level: of a CUDA device: "auto", "L0", "L1" or "L2"; see ``cuda.levels``.
            plan: a TensorRT plan file to use instead of the plan cache.
            trust_plan: use it although somebody else built it: it is native code.

        Raises:
            NotABundleError, ManifestError, IntegrityError: see ``bundle.read_bundle``.
            BackendUnavailableError: no such device, or the inference library is not installed.
            NetworkMismatchError: the network is not the one the manifest describes.
            BackendError: the library refuses the network; a plan that cannot be used.
            ConfigurationError: an unknown device, backend or precision, or one that another
                choice, the bundle or the machine excludes.
        """
        opening = Opening(
            device=device,
            backend=backend,
            threads=threads,
            precision=precision,
            lanes=lanes,
            graph_level=graph_level,
            plan=plan,
            trust_plan=trust_plan,
        )
        bundle = read_bundle(path)
        engine = cls(bundle, open_runner(bundle, opening))
        _log.info("loaded %s on %s", engine.manifest.name, engine.description)
        return engine

    @property
    def manifest(self) -> Manifest:
        """Everything the bundle says of itself."""
        return self._bundle.manifest

    @property
    def description(self) -> str:
        """What runs the network, and why it was chosen."""
        return self._runner.description

    @cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of a uint8 image."""
        image = self.manifest.image
        return image.height, image.width, image.channels

    def sample(self, n: int = 1, settings: Settings | None = None, **changes: Any) -> NDArray[Any]:
        """Draw n images.

        Args:
            n: how many, ≥ 1.
            settings: how; None means all defaults.
            **changes: fields of :class:`~ddpm_runtime.Settings` by name: ``seed=0, steps=50,
                sampler="ddim", label="Sneaker"``, ...

        Returns:
            The images in order of index: uint8 (n, H, W, C), or float32 (n, C, H, W).

        Raises:
            ConfigurationError: a bad value or an impossible combination.
            NonFiniteError: an image came out with NaN or infinity.
            BackendError: the inference library failed.
            LifecycleError: the engine is closed, or was loaded before a fork.
        """
        images = {sample.index: sample.image for sample in self.stream(n, settings, **changes)}
        return np.stack([images[index] for index in sorted(images)])

    def stream(
        self, n: int = 1, settings: Settings | None = None, **changes: Any
    ) -> Iterator[Sample]:
        """Like :meth:`sample`, but images are yielded as they finish. Stop iterating to stop.

        Everything is checked before this returns, and before the first image is begun.
        """
        asked = with_changes(settings, changes)
        program = self.program(asked)
        requests = lane_requests(asked, n, self.manifest, program)
        return self._run(program, requests, n, asked)

    def encode(self, images: NDArray[Any], *, steps: int = 100, label: Label = None) -> Float:
        """Find the x_T from which DDIM draws these images: its ODE, run from image to noise.

        ``sample(len(images), x_T=x_T, steps=steps, clip_denoised=False, label=...)`` gives the
        images back, closer with more steps; slerp two of them to morph one image into another.

        Args:
            images: (n, H, W, C) uint8, or (n, C, H, W) float32 in [−1, 1].
            steps: levels to visit, in [2, T].
            label: as in :class:`~ddpm_runtime.Settings`.

        Returns:
            (n, C, H, W) float32.

        Source: Song et al., arXiv 2010.02502 §4.3.
        """
        n = len(images)
        checked = checked_images(images, self.manifest.image, counts=(n,))
        settings = Settings(label=label, guidance_scale=None if label is None else 1.0)
        program = build_inversion(
            schedule=self._bundle.schedule,
            prediction_type=self.manifest.network.prediction_type,
            num_inference_steps=steps,
            spacing=self.manifest.defaults.spacing,
        )
        requests = [
            request | {"initial": program.table.signal[0] * image}
            for request, image in zip(
                lane_requests(settings, n, self.manifest, program), checked, strict=True
            )
        ]
        samples = self._run(program, iter(requests), n, Settings(output="float32"))
        encoded = {sample.index: sample.image for sample in samples}
        return np.stack([encoded[index] for index in sorted(encoded)])

    def program(self, settings: Settings | None = None, **changes: Any) -> SamplerProgram:
        """Compile the sampler that the settings ask for, for this network.

        Raises:
            ConfigurationError: a bad value or an impossible combination.
        """
        asked, defaults = with_changes(settings, changes), self.manifest.defaults
        asked_sampler = asked.sampler or defaults.sampler
        default_steps, default_spacing = self.defaults_for(asked_sampler)
        clips = defaults.clip_denoised if asked.clip_denoised is None else asked.clip_denoised
        arguments = {
            "sampler": asked_sampler,
            "num_inference_steps": default_steps if asked.steps is None else asked.steps,
            "spacing": asked.spacing or default_spacing,
            "strength": 1.0 if asked.strength is None else asked.strength,
            "clip": 1.0 if clips else float("inf"),
            "guidance_interval": asked.guidance_interval,
            **asked.sampler_options,
            **({} if asked.eta is None else {"eta": asked.eta}),
        }
        interval = 1 if asked.cache_interval is None else asked.cache_interval
        if interval > 1:
            self._runner.require_step_cache(self._bundle)
        key = json.dumps([arguments, interval], sort_keys=True, default=repr)
        if key not in self._programs:
            program = build_program(
                schedule=self._bundle.schedule,
                prediction_type=self.manifest.network.prediction_type,
                **arguments,
            )
            self._programs[key] = with_step_cache(program, interval)
        return self._programs[key]

    def defaults_for(self, sampler: str) -> tuple[int, str]:
        """Steps and spacing when nobody says otherwise: the bundle's, or what a sampler recommends.

        Args:
            sampler: a name or alias; the bundle's own default sampler has the bundle's defaults.

        Raises:
            ConfigurationError: no such sampler.
        """
        defaults, (name, _) = self.manifest.defaults, resolve_sampler(sampler)
        if name == resolve_sampler(defaults.sampler)[0]:
            return defaults.steps, defaults.spacing
        recommended = SAMPLERS[name]
        steps = min(recommended.recommended_steps, self._bundle.schedule.num_train_timesteps)
        return steps, recommended.recommended_spacing

    def close(self) -> None:
        """Release the network, after the calls that are under way. Idempotent.

        Sampling afterwards raises LifecycleError.
        """
        self._pool.close()

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
        program: SamplerProgram,
        requests: Iterator[dict[str, Any]],
        n: int,
        settings: Settings,
    ) -> Iterator[Sample]:
        """Refuse at once; lanes are taken with the first image, so that a stream may be dropped."""
        if os.getpid() != self._process:
            raise LifecycleError(
                "this engine was loaded before the process forked; load it in the child, or start "
                "workers with the 'spawn' method."
            )
        self._pool.require_open()
        return self._loop(program, requests, n, settings)

    def _loop(
        self,
        program: SamplerProgram,
        requests: Iterator[dict[str, Any]],
        n: int,
        settings: Settings,
    ) -> Iterator[Sample]:
        """Keep the lanes full until every request is done."""
        watched, pixels = settings.on_step is not None, settings.output == "uint8"
        rows = self._runner.rows_at_once(len(program), watched=watched)
        in_flight = min(n, settings.batch_size or _LARGEST_BATCH)
        lanes = self._pool.take(self._runner.capacity_for(in_flight))
        done_before = lanes.rows_done
        try:
            while True:
                room = min(lanes.free, in_flight - lanes.active)
                for request in islice(requests, room):
                    lanes.start(program, **request, tag=(request["index"], request["label"]))
                if not lanes.active:
                    break
                finished = lanes.advance(rows, pixels=pixels)
                if settings.on_step is not None:
                    settings.on_step(
                        StepEvent(
                            rows_done=lanes.rows_done - done_before,
                            rows_total=n * len(program),
                            previews=partial(_previews, lanes, finished, pixels),
                        )
                    )
                for lane in finished:
                    yield _sample(lane, program, pixels)
        finally:
            self._pool.give_back(lanes)


def _sample(lane: FinishedLane, program: SamplerProgram, pixels: bool) -> Sample:
    index, label = lane.tag
    if lane.failed_row is not None:
        raise NonFiniteError(
            f"image {index} holds NaN or infinity after row {lane.failed_row} of {len(program)} of "
            f"the {program.sampler} sampler. Turn clip_denoised on, use more steps, or check the "
            "network with ddpm-export's parity report."
        )
    return Sample(index=index, label=label, image=lane.pixels if pixels else lane.image)


def _previews(
    lanes: Lanes, finished: list[FinishedLane], pixels: bool
) -> dict[int, NDArray[np.uint8]]:
    shown = {tag[0]: to_uint8(image) for tag, image in lanes.images().items()}
    done = {lane.tag[0]: lane.pixels if pixels else to_uint8(lane.image) for lane in finished}
    return shown | done
