"""Every way to draw a batch on the GPU, got ready one after another and timed in turn.

A *group* is one network at one batch size: its ways are timed in interleaved rounds. What cannot
be had, fails, or does not fit into the time is left out, and named with the reason.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ddpm_runtime.errors import BackendUnavailableError, ConfigurationError
from ddpm_runtime.program import SamplerProgram

from .gpu_budget import Budget
from .gpu_ours import Networks, OurBatch
from .gpu_subjects import Subject
from .gpu_torch import TORCH_WAYS, TorchBatch
from .timing import Timed, interleave

__all__ = ["LEVELS", "PRECISIONS", "Group", "Measured", "Skipped", "Way", "our_ways", "torch_ways"]

LEVELS = ("L0", "L1", "L2")
PRECISIONS = ("fp32", "bf16", "fp16")

_GUESS_S = {"onnxruntime": 10.0, "tensorrt": 60.0, "tensorrt_rtx": 20.0}
_WARM_UP = 1
_FEWEST_ROUNDS = 3

Pixels = NDArray[np.uint8]


class Batch(Protocol):
    """A batch that can be drawn again and again."""

    description: str
    setup: dict[str, float | None]

    def __call__(self) -> Pixels: ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to draw a batch.

    Args:
        name: part of a case's id: "tensorrt-bf16-L2".
        kind: what takes alike long to get ready, for the budget.
        precision: of the network.
        guess_s: how long getting ready takes, before one of the kind has been seen.
        make: gets it ready.
    """

    name: str
    kind: str
    precision: str
    guess_s: float
    make: Callable[[], Batch]


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A case that was left out, and why."""

    case_id: str
    reason: str


@dataclass(kw_only=True, eq=False)
class Measured:
    """One way, timed.

    Args:
        way: which.
        batch: how it was made ready.
        pixels: what it drew.
        timed: all rounds of the group.
    """

    way: Way
    batch: Batch
    pixels: Pixels
    timed: Timed


@dataclass(kw_only=True, eq=False)
class Group:
    """One network at one batch size.

    Args:
        subject: the network.
        batch: lanes.
        program: the sampler.
    """

    subject: Subject
    batch: int
    program: SamplerProgram
    skipped: list[Skipped] = field(default_factory=list)

    def case_id(self, way: str) -> str:
        """Stable."""
        return f"gpu/{self.subject.name}/batch-{self.batch}/{way}"

    def skip(self, way: str, reason: str) -> None:
        """Leave a way out."""
        self.skipped.append(Skipped(case_id=self.case_id(way), reason=reason))

    def measure(
        self,
        ways: Sequence[Way],
        budget: Budget,
        *,
        rounds: int,
        report: Callable[[list[Measured]], Any],
        progress: Callable[[str], Any] = lambda _name: None,
    ) -> None:
        """Get the ways ready, time them in turn, and hand them over while they are.

        Args:
            ways: in the order in which to get them ready.
            budget: which is kept.
            rounds: at most so many.
            report: told what was measured, before it is closed.
            progress: told what is being done.
        """
        batches: dict[str, Batch] = {}
        by_name = {way.name: way for way in ways}
        try:
            for way in ways:
                progress(f"{self.case_id(way.name)}: getting ready")
                self._get_ready(way, batches, budget)
            self._leave_out_slow(batches, budget)
            if batches:
                progress(f"{self.case_id('…')}: {len(batches)} ways in turn")
                report(self._time(batches, by_name, budget, rounds))
        except Exception as error:  # a device that is lost fails in whatever comes next
            for name in batches:
                self.skip(name, _words(error))
        finally:
            for batch in batches.values():
                batch.close()
            batches.clear()
            gc.collect()

    def _get_ready(self, way: Way, batches: dict[str, Batch], budget: Budget) -> None:
        refusal = budget.refusal(way.kind, way.guess_s)
        if refusal:
            self.skip(way.name, f"no time: {refusal}")
            return
        began = time.monotonic()
        try:
            batches[way.name] = way.make()
        except Exception as error:  # libraries raise whatever they like; the others go on
            self.skip(way.name, _words(error))
            gc.collect()
        budget.took(way.kind, time.monotonic() - began)

    def _leave_out_slow(self, batches: dict[str, Batch], budget: Budget) -> None:
        """Until the fewest rounds fit into this group's share, without the slowest."""
        took_s = {}
        for name, batch in batches.items():
            began = time.perf_counter()
            batch()
            took_s[name] = time.perf_counter() - began
        while took_s and (_WARM_UP + _FEWEST_ROUNDS) * sum(took_s.values()) > budget.share_s:
            slowest = max(took_s, key=lambda name: took_s[name])
            seconds = took_s.pop(slowest)
            batches.pop(slowest).close()
            left = max(0.0, budget.share_s)
            self.skip(slowest, f"no time: {seconds:.1f} s a batch, {left:.0f} s for all rounds")

    def _time(
        self, batches: dict[str, Batch], ways: dict[str, Way], budget: Budget, rounds: int
    ) -> list[Measured]:
        drawn: dict[str, Pixels] = {}

        def drawing(name: str) -> Callable[[], None]:
            def draw() -> None:
                drawn[name] = batches[name]()

            return draw

        timed = interleave(
            {name: drawing(name) for name in batches},
            rounds=rounds,
            warm_up=_WARM_UP,
            budget_s=0.7 * budget.share_s,
        )
        return [
            Measured(way=ways[name], batch=batch, pixels=drawn[name], timed=timed)
            for name, batch in batches.items()
        ]


def our_ways(
    group: Group, networks: Networks, backends: Sequence[str], levels: Sequence[str]
) -> list[Way]:
    """Every backend, precision and graph level; a level that a backend cannot have is left out."""
    subject, ways = group.subject, []
    precisions = PRECISIONS if subject.precision == "fp32" else (subject.precision,)
    for backend in backends:
        possible = levels
        if backend == "onnxruntime":  # runs a graph of its own, which ours cannot hold
            possible = [level for level in levels if level == "L0"]
            if not possible:
                group.skip(backend, "it runs a CUDA graph of its own beside our kernels: L0 alone")
        for precision in precisions:
            for level in possible:
                ways.append(_our_way(group, networks, backend, precision, level))
    return ways


def torch_ways(group: Group, torch: Any) -> list[Way]:
    """PyTorch with the same weights; a group without them says why.

    Args:
        group: the group.
        torch: from ``gpu_torch.cuda_torch``, or the error that says why there is none.
    """
    subject = group.subject
    if isinstance(torch, BackendUnavailableError) or subject.network is None:
        group.skip("torch", subject.no_network or str(torch))
        return []
    shared: list[Any] = []

    def network() -> Any:
        if not shared and subject.network is not None:
            shared.append(subject.network())
        return shared[0]

    manifest = subject.bundle.manifest
    image = manifest.image
    return [
        Way(
            name=f"{way.name}-{way.precision}",
            kind=f"{subject.name} {way.name} {way.precision}",
            precision=way.precision,
            guess_s=way.guess_s,
            make=lambda way=way: TorchBatch(  # type: ignore[misc]
                torch,
                network(),
                way,
                group.program,
                image=(image.channels, image.height, image.width),
                batch=group.batch,
                num_classes=manifest.network.num_classes,
            ),
        )
        for way in TORCH_WAYS
    ]


def _our_way(group: Group, networks: Networks, backend: str, precision: str, level: str) -> Way:
    def make() -> Batch:
        bundle = group.subject.in_precision(precision)
        return OurBatch(networks, bundle, backend, level, group.program)

    first = level == LEVELS[0]
    return Way(
        name=f"{backend}-{precision}-{level}",
        kind=f"{group.subject.name} {backend} {precision} {'L0' if first else 'again'}",
        precision=precision,
        guess_s=_GUESS_S[backend] if first else 5.0,
        make=make,
    )


def _words(error: Exception) -> str:
    """The first line of what an error says, with its type unless it is one of ours."""
    said = (str(error).strip() or "it said nothing").splitlines()[0][:400]
    known = isinstance(error, BackendUnavailableError | ConfigurationError)
    return said if known else f"{type(error).__name__}: {said}"
