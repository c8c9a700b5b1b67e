"""Diffusers' schedulers driven over a trajectory, as shipped or with every table in float64.

Their tables are float32 because their modules say ``torch.float32`` and ``np.float32``.
``precision`` replaces those two names inside a scheduler's own module, so that the same code runs
in float64.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch

from ddpm_runtime.samplers import compile_program
from ddpm_runtime.schedule import make_schedule
from ddpm_runtime.trajectory import discrete_trajectory

from . import float64_lanes
from .mixture import denoiser

with warnings.catch_warnings():
    # diffusers 0.42 imports deprecated names of its own dependencies; nothing of ours
    warnings.simplefilter("ignore")
    import diffusers


SHIPPED, EXACT = torch.float32, torch.float64
# the noise schedules both sides have, by their names there and here
SCHEDULES = {
    "linear": (
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
        {"name": "linear"},
    ),
    "scaled_linear": (
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"name": "scaled_linear"},
    ),
    "cosine": ({"beta_schedule": "squaredcos_cap_v2"}, {"name": "cosine"}),
}  # fmt: skip
ALL_TYPES = ("epsilon", "sample", "v_prediction")


def answer(prediction_type, x, signal, noise):
    x_0 = denoiser(x, signal, noise)
    epsilon = (x - signal * x_0) / noise
    return {"epsilon": epsilon, "sample": x_0, "v_prediction": signal * epsilon - noise * x_0}[
        prediction_type
    ]


@dataclass(frozen=True)
class Case:
    """One scheduler, and the sampler that must follow it."""

    scheduler: str
    sampler: str
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    step_options: dict[str, Any] = field(default_factory=dict)
    types: tuple[str, ...] = ALL_TYPES
    spacings: tuple[str, ...] = ("leading", "trailing", "linspace")
    clip: float = np.inf
    scaled: bool = False
    steps: int = 10

    @property
    def name(self):
        extra = [f"{k}={v}" for k, v in {**self.config, **self.step_options}.items()]
        return "-".join([self.scheduler, self.sampler, *extra])


class _Float64:
    """A module whose ``float32`` is float64."""

    def __init__(self, module):
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, "float64" if name == "float32" else name)


@contextlib.contextmanager
def precision(scheduler_name, dtype):
    """Run a scheduler's code in ``dtype``; float32 is as shipped."""
    module = sys.modules[getattr(diffusers, scheduler_name).__module__]
    with contextlib.ExitStack() as stack:
        if dtype == torch.float64:
            stack.enter_context(mock.patch.object(module, "torch", _Float64(torch)))
            if hasattr(module, "np"):
                stack.enter_context(mock.patch.object(module, "np", _Float64(np)))
            before = torch.get_default_dtype()
            torch.set_default_dtype(torch.float64)
            stack.callback(torch.set_default_dtype, before)
        yield module


def make(scheduler_name, **config):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # "dpmsolver" is deprecated there
        return getattr(diffusers, scheduler_name)(**config)


def drive(
    scheduler, module, network, x_T, draws, dtype, *, scaled=False, levels=None, **step_options
):
    """x_t after every step, on the variance-preserving level, as float64 NumPy.

    Args:
        scheduler: with its timesteps set.
        module: where it lives, for its ``randn_tensor``.
        network: ``network(x, signal, noise, i)`` on float64 arrays of variance-preserving x_t.
        x_T: (n,) start, variance preserving.
        draws: (steps, n) noise of each step.
        dtype: of samples and answers.
        scaled: whether the scheduler's sample is x_t / signal.
        levels: (signal, noise) of every step; the scheduler's own if None.
    """
    drawn = iter(draws)

    def randn_tensor(shape, **_):
        return torch.tensor(next(drawn), dtype=dtype).reshape(shape)

    levels = level_of(scheduler) if levels is None else levels
    x = torch.tensor(x_T / (levels[0][0] if scaled else 1.0), dtype=dtype)
    x = x.reshape(1, 1, -1, 1)
    out = []
    patched = (
        mock.patch.object(module, "randn_tensor", randn_tensor)
        if hasattr(module, "randn_tensor")
        else contextlib.nullcontext()
    )
    with patched:
        for i, t in enumerate(scheduler.timesteps):
            signal, noise = levels[i]
            shown = scheduler.scale_model_input(x, t).to(torch.float64).numpy().reshape(-1)
            answer = torch.tensor(network(shown, signal, noise, i), dtype=dtype)
            answer = answer.reshape(1, -1, *x.shape[2:])  # learned variances: a second channel
            x = scheduler.step(answer, t, x, **step_options).prev_sample
            after = levels[i + 1][0] if scaled else 1.0
            out.append(x.to(torch.float64).numpy().reshape(-1) * after)
    return np.stack(out)


def level_of(scheduler):
    """(signal, noise) of every step's start and of the end, from the scheduler's own tables."""
    if getattr(scheduler, "sigmas", None) is not None:
        sigma = scheduler.sigmas.to(torch.float64).numpy()
        sigma = sigma[: len(scheduler.timesteps) + 1]
    else:
        a = scheduler.alphas_cumprod.to(torch.float64).numpy()[scheduler.timesteps.numpy()]
        sigma = np.append(np.sqrt((1 - a) / a), 0.0)
    return [(1 / np.sqrt(1 + s**2), s / np.sqrt(1 + s**2)) for s in sigma]


def both(case, prediction_type, spacing, dtype, schedule_name="linear"):
    """x_t after every step: (ours, theirs), over the timesteps that theirs visits."""
    theirs, ours = SCHEDULES[schedule_name]
    rng = np.random.default_rng(3)
    with precision(case.scheduler, dtype) as module:
        scheduler = make(
            case.scheduler,
            prediction_type=prediction_type,
            timestep_spacing=spacing,
            **theirs,
            **case.config,
        )
        scheduler.set_timesteps(case.steps)
        rows = len(scheduler.timesteps)
        x_T, draws = rng.normal(size=64), rng.normal(size=(rows, 64))
        their_x = drive(
            scheduler,
            module,
            lambda x, signal, noise, i: answer(prediction_type, x, signal, noise),
            x_T,
            draws,
            dtype,
            scaled=case.scaled,
            **case.step_options,
        )
    visited = np.unique(scheduler.timesteps.to(torch.float64).numpy())[::-1]
    schedule = make_schedule(**ours)
    trajectory = discrete_trajectory(schedule, prediction_type, visited)
    program = compile_program(case.sampler, trajectory, clip=case.clip, **case.options)
    assert len(program) == rows

    def network(x, timestep, row):
        a = schedule.alphas_cumprod_at(np.array([timestep]))[0]
        return answer(prediction_type, x, np.sqrt(a), np.sqrt(1 - a))

    return float64_lanes.run(program, network, x_T, draws), their_x
