"""ddpm-bench profile: where every microsecond of a step goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from ddpm_runtime.backends.base import Backend
from ddpm_runtime.lanes import HostLanes

from .report import print_rows
from .speed_options import check_positive, engine_options, json_option
from .speed_report import Case, finish, load_average, make_report, sampled_case
from .stepping import SplitBackend, Stepper, open_split, program_for, step_label

__all__ = ["PARTS", "ProfiledLanes", "profile_command"]

_QUESTION = "What does a step do besides evaluating the network, and what does each part cost?"
_UNFAIR = [
    "the clock itself costs a fraction of a microsecond a part",
    "'elementwise' is what no other part covers: clipping, and the loop itself",
]
_INPUTS = "network inputs"
PARTS = {
    "_columns": "columns",
    "_present_noise": "noise",
    "_weighted_sum": "weighted sums",
    "_restore_known": "inpainting",
    "_retire": "finish and check",
}


class ProfiledLanes(HostLanes):
    """Host lanes that count the seconds of their parts."""

    def __init__(self, backend: Backend, capacity: int) -> None:
        super().__init__(backend, capacity)
        self.seconds: dict[str, float] = defaultdict(float)
        for method, part in PARTS.items():
            setattr(self, method, self._clocked(getattr(self, method), part))
        evaluator: Any = self._evaluator
        evaluator.predict = self._clocked(evaluator.predict, _INPUTS)

    def _clocked(self, method: Callable[..., Any], part: str) -> Callable[..., Any]:
        def clocked(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*arguments, **named)
            finally:
                self.seconds[part] += time.perf_counter() - began

        return clocked


@click.command("profile")
@engine_options
@click.option("--sampler", "samplers", multiple=True, default=("ddim", "ddpm"))
@click.option("--batch-size", "batch_sizes", type=int, multiple=True, default=(1, 8, 64))
@click.option("--rounds", default=10, help="Timed trajectories of each case.")
@json_option
@click.pass_context
def profile_command(
    context: click.Context, /, engine_path: Path, samplers: tuple[str, ...],
    batch_sizes: tuple[int, ...], rounds: int, json_path: Path | None, precision: str,
    **options: Any,
) -> None:  # fmt: skip
    """Split the time of a step by what the host loop does. Medians of means, in microseconds."""
    check_positive(batch_size=batch_sizes, rounds=rounds)
    load = load_average()
    bundle, backend = open_split(engine_path, precision=precision, **options)
    label = step_label(backend, precision, bundle)
    cases, rows = [], []
    for sampler in samplers:
        program = program_for(bundle, sampler)
        for batch in sorted(set(batch_sizes)):
            stepper = Stepper(backend, program, batch, ProfiledLanes)
            found = _profile(backend, stepper, rounds)
            cases.append(_case(f"profile/{label}/{sampler}/batch-{batch}", found, batch))
            parts = cases[-1]["parts_us"]
            ours = sum(parts.values()) - parts["network"]
            share = ours / sum(parts.values())
            cells = (f"{parts[part]:.0f}" for part in parts)
            rows.append((f"{sampler}, batch {batch}", *cells, f"{ours:.0f}", f"{share:.2%}"))
    header = ("µs a step", *cases[0]["parts_us"], "ours", "share")
    print_rows([header, *rows])
    report = make_report(
        context,
        question=_QUESTION,
        known_unfairness=_UNFAIR,
        threads=options["threads"],
        load_before=load,
    )
    report["engine"] = {"name": bundle.manifest.name, "backend": backend.description}
    report["cases"] = cases
    finish(report, json_path)


def _profile(backend: SplitBackend, stepper: Stepper, rounds: int) -> dict[str, list[float]]:
    """Milliseconds a row of each part: means over whole trajectories.

    What the loop does for several rows at once would be free in the median of single rows.
    """
    lanes: Any = stepper.lanes
    found: dict[str, list[float]] = defaultdict(list)
    for trajectory in range(rounds + 1):
        stepper.begin()
        lanes.seconds.clear()
        network, began, rows = backend.network_s, time.perf_counter(), 0
        while lanes.active:
            lanes.advance()
            rows += 1
        whole = time.perf_counter() - began
        if not trajectory:
            continue  # the first warms up
        network = backend.network_s - network
        parts = {part: lanes.seconds[part] for part in (_INPUTS, *PARTS.values())}
        parts[_INPUTS] -= network
        rest = whole - network - sum(parts.values())
        found["network"].append(1e3 * network / rows)
        for part, seconds in {**parts, "elementwise": rest, "step": whole}.items():
            found[part].append(1e3 * seconds / rows)
    return found


def _case(case_id: str, found: dict[str, list[float]], batch: int) -> Case:
    parts = {part: 1e3 * float(np.median(ms)) for part, ms in found.items() if part != "step"}
    return sampled_case(case_id, found["step"], parts_us=parts, batch_size=batch)
