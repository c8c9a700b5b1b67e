"""Solvers of second order and above, as their papers have them; conventions as in ``oracles``.

Written in σ-space for Karras et al., in λ-space for Lu et al. and Zhao et al. Integrals of
interpolating polynomials, and with them Adams–Bashforth coefficients, are done by quadrature, so a
coefficient typed wrongly in the library meets no twin.
"""

from __future__ import annotations

import math

import numpy as np

# --- quadrature ------------------------------------------------------------------------------

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(40)
_U, _dU = (_NODES + 1) / 2, _WEIGHTS / 2


def _lagrange(at, nodes):
    """The Lagrange basis of ``nodes`` at the points ``at``: (len(nodes), len(at))."""
    return np.stack(
        [
            np.prod([(at - b) / (a - b) for b in nodes if b != a] or [np.ones_like(at)], axis=0)
            for a in nodes
        ]
    )


def exponential_integral(h, nodes, rate=1.0):
    """∫₀¹ rate·h·e^(−rate·h·(1−u)) ℓ_j(u) du for the Lagrange basis of nodes (in steps of h)."""
    kernel = rate * h * np.exp(-rate * h * (1 - _U))
    return _lagrange(_U, nodes) @ (kernel * _dU)


def adams_bashforth(order):
    """∫₀¹ ℓ_j(u) du over equally spaced nodes 0, −1, −2, …"""
    return _lagrange(_U, [-float(j) for j in range(order)]) @ _dU


# --- several evaluations a step ---------------------------------------------------------------


def heun(levels, denoise, x, z):
    """EDM Algorithm 1 on x / signal. ``levels`` visits each level but the first and last twice."""
    out, k = [], 0
    while k < len(levels) - 1:
        (signal_t, noise_t), (signal_s, noise_s) = levels[k], levels[k + 1]
        t, t_next = noise_t / signal_t, noise_s / signal_s
        x_i = x / signal_t
        d = (x_i - denoise(x, k)) / t
        x_next = x_i + (t_next - t) * d
        x = signal_s * x_next
        out.append(x)
        k += 1
        if t_next != 0:
            d_next = (x_next - denoise(x, k)) / t_next
            x = signal_s * (x_i + (t_next - t) * (d / 2 + d_next / 2))
            out.append(x)
            k += 1
    return out


def _lambdas(levels):
    return [math.log(a / s) if s > 0 else math.inf for a, s in levels]


def singlestep(levels, denoise, x, z, order, data, solver_type="midpoint"):
    """DPM-Solver-2/-3 (data = False) and their ++ forms; ``order`` evaluations a step."""
    lam, out, k = _lambdas(levels), [], 0
    while k < len(levels) - 1:
        if k + order >= len(levels) - 1 and levels[-1][1] == 0:  # the last step, to no noise
            x = levels[-1][0] * denoise(x, k)
            out.append(x)
            break
        h = lam[k + order] - lam[k]
        stages = _dpm_2 if order == 2 else _dpm_3
        x_t = x
        answers = []

        def answer(X, k=k, answers=answers):
            at = k + len(answers)
            x_0 = denoise(X, at)
            answers.append(x_0 if data else (X - levels[at][0] * x_0) / levels[at][1])

        rs = [(lam[k + j] - lam[k]) / h for j in range(1, order)]
        for x in stages(levels[k : k + order + 1], h, rs, x_t, answer, answers, data, solver_type):
            out.append(x)
        k += order
    return out


def _transfer(x, N, a, b, data):
    """First-order step between levels: Lu et al. (++) eq. 8, (DPM-Solver) eq. 3.7."""
    (alpha_s, sigma_s), (alpha_t, sigma_t) = a, b
    h = math.log(alpha_t / sigma_t) - math.log(alpha_s / sigma_s)
    if data:
        return sigma_t / sigma_s * x - alpha_t * (math.exp(-h) - 1) * N
    return alpha_t / alpha_s * x - sigma_t * (math.exp(h) - 1) * N


def _polynomial_step(x, Ns, nodes, h, a, b, data):
    """The exact solution between two levels for the polynomial through answers at ``nodes``."""
    (alpha_s, sigma_s), (alpha_t, sigma_t) = a, b
    if data:
        weights = exponential_integral(h, nodes)
        return sigma_t / sigma_s * x + alpha_t * sum(
            w * N for w, N in zip(weights, Ns, strict=True)
        )
    # x_t = α_t/α_s x − α_t ∫ e^(−λ) ε dλ; in steps of h, e^(−λ) = e^(−λ_t)·e^(h(1−u))
    weights = _lagrange(_U, nodes) @ (h * np.exp(h * (1 - _U)) * _dU)
    return alpha_t / alpha_s * x - sigma_t * sum(w * N for w, N in zip(weights, Ns, strict=True))


def _dpm_2(levels, h, rs, x, answer, N, data, solver_type):
    (r,) = rs
    answer(x)
    u = _transfer(x, N[0], levels[0], levels[1], data)
    yield u
    answer(u)
    if solver_type == "heun":
        yield _polynomial_step(x, N, [0.0, r], h, levels[0], levels[2], data)
    else:
        # the paper's form: the first-order step along (1 − 1/2r)·N_0 + 1/2r·N_1
        mean = (1 - 1 / (2 * r)) * N[0] + 1 / (2 * r) * N[1]
        yield _transfer(x, mean, levels[0], levels[2], data)


def _dpm_3(levels, h, rs, x, answer, N, data, solver_type):
    r_1, r_2 = rs
    answer(x)
    u = _transfer(x, N[0], levels[0], levels[1], data)
    yield u
    answer(u)
    # Algorithm 2 line 6: the line through N_0 and N_1, integrated up to r_2
    u = _polynomial_step(x, N, [0.0, r_1 / r_2], r_2 * h, levels[0], levels[2], data)
    yield u
    answer(u)
    if solver_type == "heun":
        yield _polynomial_step(x, N, [0.0, r_1, r_2], h, levels[0], levels[3], data)
    else:
        # line 9: the line through N_0 and N_2
        yield _polynomial_step(x, [N[0], N[2]], [0.0, r_2], h, levels[0], levels[3], data)


# --- history ----------------------------------------------------------------------------------


def _few_steps_left(k, steps, ends_clean):
    """diffusers' lower_order_final: orders allowed for step k."""
    if ends_clean and k == steps - 1:
        return 1
    if ends_clean and k == steps - 2 and steps < 15:
        return 2
    return 9


def dpmpp_multistep(
    levels, denoise, x, z, order=2, eta=0.0, solver_type="midpoint", published=False
):
    """DPM-Solver++(2M/3M) and SDE-2M in k-diffusion's variables, on x / signal."""
    lam, steps, out, old = _lambdas(levels), len(levels) - 1, [], []
    for k in range(steps):
        (alpha_t, _), (alpha_s, sigma_s) = levels[k], levels[k + 1]
        old = [denoise(x, k), *old]
        p = min(order, k + 1, _few_steps_left(k, steps, sigma_s == 0 or levels[-1][1] == 0))
        if sigma_s == 0:
            x = alpha_s * old[0]
            out.append(x)
            continue
        h = lam[k + 1] - lam[k]
        t, s = math.exp(-lam[k]), math.exp(-lam[k + 1])  # σ-space
        keep = s / t * math.exp(-eta * h)
        sde = z[k] * s * math.sqrt(-math.expm1(-2 * eta * h))
        nodes = [(lam[k - j] - lam[k]) / h for j in range(p)]
        if p == 2 and solver_type == "midpoint":
            r = -nodes[1]
            mean = (1 + 1 / (2 * r)) * old[0] - 1 / (2 * r) * old[1]
            y = keep * x / alpha_t - math.expm1(-(1 + eta) * h) * mean + sde
        elif p == 3 and published:
            r_0, r_1 = -nodes[1], nodes[1] - nodes[2]
            d1_0, d1_1 = (old[0] - old[1]) / r_0, (old[1] - old[2]) / r_1
            d1 = d1_0 + (d1_0 - d1_1) * r_0 / (r_0 + r_1)
            d2 = (d1_0 - d1_1) / (r_0 + r_1)
            phi_2 = math.expm1(-h) / h + 1
            phi_3 = phi_2 / h - 0.5
            y = keep * x / alpha_t - math.expm1(-h) * old[0] + phi_2 * d1 - phi_3 * d2
        else:
            weights = exponential_integral(h, nodes, rate=1 + eta)
            y = keep * x / alpha_t + sum(w * N for w, N in zip(weights, old[:p], strict=True)) + sde
        x = alpha_s * y
        out.append(x)
    return out


def unipc(levels, denoise, x, z, order=2, solver_type="bh2"):
    """UniPC, Algorithms 1 and 2, predictor and corrector apart.

    Where the paper solves for ρ the result is the polynomial through the answers, integrated
    exactly, whatever B(h) is; B(h) matters only where the code sets ρ = ½.
    """
    lam, steps, out, old = _lambdas(levels), len(levels) - 1, [], []
    predicted = corrected = x
    h = p = None
    for k in range(steps):
        x_0 = denoise(predicted, k)
        if k > 0:
            nodes = [(lam[k - 1 - j] - lam[k - 1]) / h for j in range(p)]
            a, b = levels[k - 1], levels[k]
            if p == 1:
                B = -h if solver_type == "bh1" else math.expm1(-h)
                base = _transfer(corrected, old[0], a, b, True)
                corrected = base - b[0] * B * 0.5 * (x_0 - old[0])
            else:
                corrected = _polynomial_step(
                    corrected, [x_0, *old[:p]], [1.0, *nodes], h, a, b, True
                )
        else:
            corrected = predicted
        old = [x_0, *old]
        a, b = levels[k], levels[k + 1]
        if b[1] == 0:
            predicted = b[0] * x_0
            out.append(predicted)
            continue
        h = lam[k + 1] - lam[k]
        p = min(order, k + 1, steps - k if levels[-1][1] == 0 else order)
        nodes = [(lam[k - j] - lam[k]) / h for j in range(p)]
        if p == 2:
            B = -h if solver_type == "bh1" else math.expm1(-h)
            base = _transfer(corrected, x_0, a, b, True)
            predicted = base - b[0] * B * 0.5 * (old[1] - x_0) / nodes[1]
        else:
            predicted = _polynomial_step(corrected, old[:p], nodes, h, a, b, True)
        out.append(predicted)
    return out


def ipndm(levels, denoise, x, z, order=4):
    """Adams–Bashforth on dx̂/dσ = ε, as if σ were equally spaced."""
    out, old = [], []
    for k in range(len(levels) - 1):
        x, old = adams_step(x, old, denoise, k, levels[k], levels[k + 1], order)
        out.append(x)
    return out


def adams_step(x, old, denoise, k, a, b, order):
    epsilon = (x - a[0] * denoise(x, k)) / a[1]
    old = [epsilon, *old][:order]
    mean = sum(c * e for c, e in zip(adams_bashforth(len(old)), old, strict=True))
    return b[0] * (x / a[0] + (b[1] / b[0] - a[1] / a[0]) * mean), old


def plms(levels, denoise, x, z):
    """CompVis' PLMS: the second level is visited twice (``levels`` has it twice)."""
    a, b = levels[0], levels[1]
    first = (x - a[0] * denoise(x, 0)) / a[1]

    def move(epsilon):
        return b[0] * (x / a[0] + (b[1] / b[0] - a[1] / a[0]) * epsilon)

    if len(levels) == 2:
        return [move(first)]
    euler_x = move(first)
    second = (euler_x - b[0] * denoise(euler_x, 1)) / b[1]
    x = move((first + second) / 2)
    out, old = [euler_x, x], [first]
    for k in range(2, len(levels) - 1):
        x, old = adams_step(x, old, denoise, k, levels[k], levels[k + 1], 4)
        out.append(x)
    return out
