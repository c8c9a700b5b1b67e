"""Where samplers are tried: schedules, spacings and prediction types, with levels worked out apart.

A world is a trajectory of the library beside the same levels by another route (sums of log1p in
place of products; interpolation written out; Karras et al. Table 1 for EDM), and the catalogue says
which oracle answers for which sampler, and which levels it evaluates the network at.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from ddpm_runtime.schedule import karras_sigmas, make_schedule, timestep_spacing
from ddpm_runtime.trajectory import discrete_trajectory, edm_trajectory

from . import oracles, solver_oracles


@dataclass(frozen=True)
class World:
    name: str
    schedule: dict[str, Any] | None  # None: an EDM network
    spacing: str
    steps: int
    prediction_type: str

    @property
    def trajectory(self):
        if self.schedule is None:
            return edm_trajectory(karras_sigmas(self.steps), sigma_data=0.6)
        schedule = make_schedule(**self.schedule)
        t = timestep_spacing(self.spacing, schedule.num_train_timesteps, self.steps, schedule)
        return discrete_trajectory(schedule, self.prediction_type, t)

    def level(self, timestep):
        """(signal, noise) told apart from the library's own arithmetic."""
        if self.schedule is None:
            return 1.0, math.exp(4 * timestep)
        betas = make_schedule(**self.schedule).betas

        def log_sigma(t):
            log_signal_squared = math.fsum(math.log1p(-beta) for beta in betas[: t + 1])
            return 0.5 * (math.log(-math.expm1(log_signal_squared)) - log_signal_squared)

        low = math.floor(timestep)
        part = timestep - low
        value = log_sigma(low)
        if part:
            value = (1 - part) * value + part * log_sigma(low + 1)
        sigma = math.exp(value)
        return 1 / math.sqrt(1 + sigma**2), sigma / math.sqrt(1 + sigma**2)

    def levels(self, timesteps):
        known = {t: self.level(t) for t in sorted(set(timesteps))}
        return [known[t] for t in timesteps] + [(1.0, 0.0)]

    def timestep_at(self, log_snr):
        """The inverse of ``level`` by bisection."""
        if self.schedule is None:
            return -log_snr / 4
        low, high = 0.0, float(self.schedule.get("num_train_timesteps", 1000) - 1)
        for _ in range(60):
            middle = (low + high) / 2
            signal, noise = self.level(middle)
            low, high = (middle, high) if math.log(signal / noise) > log_snr else (low, middle)
        return middle

    def denoise(self, network, levels, clip=math.inf):
        kind = "edm" if self.schedule is None else self.prediction_type
        return oracles.denoise_from(network, levels, kind, clip, sigma_data=0.6)


LINEAR = {"name": "linear", "num_train_timesteps": 1000}
COSINE = {"name": "cosine", "num_train_timesteps": 300}
SCALED_LINEAR = {"name": "scaled_linear", "num_train_timesteps": 1000}
SIGMOID = {"name": "sigmoid", "num_train_timesteps": 400}
WORLDS = [
    World("linear-leading-20-epsilon", LINEAR, "leading", 20, "epsilon"),
    World("linear-trailing-10-v", LINEAR, "trailing", 10, "v_prediction"),
    World("linear-linspace-16-sample", LINEAR, "linspace", 16, "sample"),
    World("cosine-quadratic-25-v", COSINE, "quadratic", 25, "v_prediction"),
    World("scaled_linear-karras-12-epsilon", SCALED_LINEAR, "karras", 12, "epsilon"),
    World("sigmoid-log_snr-18-sample", SIGMOID, "log_snr", 18, "sample"),
    World("one-step-epsilon", LINEAR, "trailing", 1, "epsilon"),
    World("two-steps-sample", LINEAR, "trailing", 2, "sample"),
    World("three-steps-v", LINEAR, "leading", 3, "v_prediction"),
    World("edm-18", None, "karras", 18, "edm"),
]


def once(world, t):
    return t


def heun_visits(world, t):
    return [t[0], *np.repeat(t[1:], 2)]


def plms_visits(world, t):
    return t if len(t) == 1 else [t[0], t[1], *t[1:]]


def inside(fractions):
    def visits(world, t):
        visited = []
        for a, b in pairwise(t):
            (sa, na), (sb, nb) = world.level(a), world.level(b)
            start, h = math.log(sa / na), math.log(sb / nb) - math.log(sa / na)
            visited += [a, *(world.timestep_at(start + r * h) for r in fractions)]
        return [*visited, t[-1]]

    return visits


def repeated(times, last=0):
    return lambda world, t: [*np.repeat(t, times), *[t[-1]] * last]


@dataclass(frozen=True)
class Case:
    sampler: str
    options: dict[str, Any]
    oracle: Any
    oracle_options: dict[str, Any] = field(default_factory=dict)
    visits: Any = once

    @property
    def name(self):
        return "-".join([self.sampler, *(f"{k}={v}" for k, v in self.options.items())])


def _same(sampler, oracle, visits=once, **options):
    return Case(sampler, options, oracle, options, visits)


def _single(sampler, order, data, solver_type):
    fractions = [j / order for j in range(1, order)]
    oracle_options = {"order": order, "data": data, "solver_type": solver_type}
    return Case(
        sampler,
        {"solver_type": solver_type},
        solver_oracles.singlestep,
        oracle_options,
        inside(fractions),
    )


def _multi(sampler, order, **options):
    return Case(sampler, options, solver_oracles.dpmpp_multistep, {"order": order, **options})


CASES = [
    _same("ddpm", oracles.ddpm),
    _same("ddpm", oracles.ddpm, variance="fixed_small"),
    _same("ddpm", oracles.ddpm, variance="fixed_large"),
    *(_same("ddim", oracles.ddim, eta=eta) for eta in (0.0, 0.3, 0.5, 1.0)),
    Case("ddim", {}, oracles.ddim, {"eta": 0.0}),
    _same("euler", oracles.euler),
    _same("euler_ancestral", oracles.euler_ancestral),
    _same("euler_ancestral", oracles.euler_ancestral, eta=0.4),
    _same("heun", solver_oracles.heun, heun_visits),
    _multi("dpmpp_2m", 2),
    _multi("dpmpp_2m", 2, solver_type="heun"),
    _multi("dpmpp_3m", 3),
    _multi("dpmpp_3m", 3, published=True),
    Case("dpmpp_2m_sde", {}, solver_oracles.dpmpp_multistep, {"order": 2, "eta": 1.0}),
    _multi("dpmpp_2m_sde", 2, eta=0.5),
    _multi("dpmpp_2m_sde", 2, eta=0.0),
    _multi("dpmpp_2m_sde", 2, eta=1.0, solver_type="heun"),
    *(_single("dpmpp_2s", 2, True, kind) for kind in ("midpoint", "heun")),
    *(_single("dpmpp_3s", 3, True, kind) for kind in ("midpoint", "heun")),
    *(_single("dpm_solver_2s", 2, False, kind) for kind in ("midpoint", "heun")),
    *(_single("dpm_solver_3s", 3, False, kind) for kind in ("midpoint", "heun")),
    _same("unipc", solver_oracles.unipc),
    *(
        _same("unipc", solver_oracles.unipc, order=order, solver_type=kind)
        for order in (1, 2, 3)
        for kind in ("bh1", "bh2")
    ),
    _same("ipndm", solver_oracles.ipndm),
    *(_same("ipndm", solver_oracles.ipndm, order=order) for order in (1, 2, 3, 4)),
    _same("plms", solver_oracles.plms, plms_visits),
    _same("langevin", oracles.langevin, repeated(5, last=1)),
    _same("langevin", oracles.langevin, repeated(2, last=1), inner_steps=2, step_size=0.7),
    _same("predictor_corrector", oracles.predictor_corrector, repeated(2)),
    _same(
        "predictor_corrector", oracles.predictor_corrector, repeated(3), corrector_steps=2, snr=0.3
    ),
    _same("predictor_corrector", oracles.predictor_corrector, repeated(1), corrector_steps=0),
]
