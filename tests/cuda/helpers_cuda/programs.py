"""Programs to run: every sampler there is, and tables no sampler would make."""

from __future__ import annotations

import numpy as np

from ddpm_runtime.program import SamplerProgram
from ddpm_runtime.samplers import SAMPLERS, build_program
from ddpm_runtime.schedule import make_schedule

SCHEDULE = make_schedule(num_train_timesteps=100)


class AnyProgram(SamplerProgram):
    """A table that need not be a sampler: only the arithmetic is wanted."""

    def _check_levels(self) -> None:
        pass


def real_programs(steps: int = 6) -> dict[str, SamplerProgram]:
    """Every registered sampler, with what makes it draw noise, at both clips."""
    programs = {}
    for name, sampler in SAMPLERS.items():
        for clip in (1.0, float("inf")):
            options = {"eta": 0.7} if "eta" in sampler.options else {}
            made = build_program(
                name,
                schedule=SCHEDULE,
                prediction_type="epsilon",
                num_inference_steps=steps,
                clip=clip,
                **options,
            )
            if not made.learns_variance:
                programs[f"{name}, clip {clip:g}"] = made
    return programs


def random_program(
    registers: int,
    rows: int,
    seed: int,
    *,
    learned: bool = False,
    noisy: bool = True,
    always_asks: bool = False,
) -> SamplerProgram:
    """Any table at all; the clip is sometimes infinity, some rows do not ask the network."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(rows, registers, registers + 3)) / registers
    weights[rng.random(weights.shape) < 0.2] = 0.0
    if not noisy:
        weights[:, :, -1] = 0.0
    evaluates = np.ones(rows, bool) if always_asks else rng.random(rows) < 0.8
    weights[~evaluates, :, -3:-1] = 0.0
    low = rng.normal(size=rows) - 2
    high = np.where(evaluates, rng.normal(size=rows), low)
    return AnyProgram(
        sampler=f"random {seed}",
        timesteps=np.linspace(99, 0, rows),
        input_scale=rng.uniform(0.5, 1.5, rows),
        x0_from_x=rng.normal(size=rows),
        x0_from_m=rng.normal(size=rows),
        clip=np.where(rng.random(rows) < 0.5, 1.0, np.inf),
        weights=weights,
        signal=rng.uniform(0.1, 1, rows + 1),
        noise=rng.uniform(0.1, 1, rows + 1),
        initial_scale=1.5,
        log_sigma_min=low if learned else None,
        log_sigma_max=high if learned else None,
        evaluates=evaluates,
        guided=rng.random(rows) < 0.7,
        keeps_variance=False,
    )
