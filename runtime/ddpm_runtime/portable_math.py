"""log, sin, cos and exp in float32 that give the same bits on every device.

Library transcendental functions differ in their last bits between NumPy, libm and CUDA. These use
only operations that IEEE 754 rounds one way (add, subtract, multiply, square root, conversions and
integer operations), each rounded on its own, never fused. A C++ or CUDA twin that does the same
operations in the same order gives the same bits.

The polynomials are the classic single-precision minimax fits of S. L. Moshier's Cephes library
(1989): log on [√½, √2], sin and cos on [−π/4, π/4], exp on [−½·ln 2, ½·ln 2].
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["exp", "log_unit", "sincos_turn"]

Float = NDArray[np.float32]
_f = np.float32


def _polynomial(x: Float, coefficients: tuple[float, ...]) -> Float:
    """Horner's rule, highest power first, every product and sum rounded to float32."""
    total = np.full_like(x, _f(coefficients[0]))
    for coefficient in coefficients[1:]:
        total *= x
        total += _f(coefficient)
    return total


def log_unit(u: Float) -> Float:
    """Natural logarithm for normal numbers u in (0, 1]; relative error < 1e-7.

    Args:
        u: float32 array of any shape.
    """
    bits = u.view(np.uint32)
    exponent = (bits >> np.uint32(23)).astype(np.int32) - np.int32(126)
    mantissa = ((bits & np.uint32(0x007FFFFF)) | np.uint32(0x3F000000)).view(np.float32)
    low = mantissa < _f(0.707106781186547524)
    exponent -= low
    m = np.where(low, (mantissa + mantissa) - _f(1), mantissa - _f(1))
    square = m * m
    fit = _polynomial(
        m,
        (
            7.0376836292e-2,
            -1.1514610310e-1,
            1.1676998740e-1,
            -1.2420140846e-1,
            1.4249322787e-1,
            -1.6668057665e-1,
            2.0000714765e-1,
            -2.4999993993e-1,
            3.3333331174e-1,
        ),
    )
    power = exponent.astype(np.float32)
    # ln 2 in two pieces, so that power·ln2 loses nothing
    tail = (fit * m) * square + power * _f(-2.12194440e-4)
    tail = tail + _f(-0.5) * square
    logarithm: Float = (m + tail) + power * _f(0.693359375)
    return logarithm


def sincos_turn(turn: NDArray[np.uint32]) -> tuple[Float, Float]:
    """Sine and cosine of 2π·turn/2²⁴; absolute error < 1.1e-7.

    Args:
        turn: uint32 in [0, 2²⁴): the angle as an exact fraction of a turn, so that reducing it to
            an eighth of a turn is integer arithmetic.
    """
    quadrant = (turn + np.uint32(1 << 21)) >> np.uint32(22)
    remainder = turn.astype(np.int32) - (quadrant << np.uint32(22)).astype(np.int32)
    angle = remainder.astype(np.float32) * _f(3.7450704e-7)  # 2π / 2²⁴
    square = angle * angle
    odd = _polynomial(square, (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1))
    odd = (odd * square) * angle + angle
    even = _polynomial(square, (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2))
    even = (_f(1) - _f(0.5) * square) + even * (square * square)
    swap = (quadrant & np.uint32(1)).astype(bool)
    sine, cosine = np.where(swap, even, odd), np.where(swap, odd, even)
    return (
        np.where(quadrant & np.uint32(2), -sine, sine),
        np.where((quadrant + np.uint32(1)) & np.uint32(2), -cosine, cosine),
    )


def exp(x: Float) -> Float:
    """e^x for x in [−87, 88] (clamped there); relative error < 2e-7.

    Args:
        x: float32 array of any shape.
    """
    x = np.minimum(np.maximum(x, _f(-87)), _f(88))
    whole = np.floor(x * _f(1.44269504088896341) + _f(0.5))
    r = (x - whole * _f(0.693359375)) - whole * _f(-2.12194440e-4)
    square = r * r
    fit = _polynomial(
        r,
        (
            1.9875691500e-4,
            1.3981999507e-3,
            8.3334519073e-3,
            4.1665795894e-2,
            1.6666665459e-1,
            5.0000001201e-1,
        ),
    )
    mantissa = (fit * square + r) + _f(1)
    scale: Any = ((whole.astype(np.int32) + np.int32(127)) << np.int32(23)).view(np.float32)
    result: Float = mantissa * scale
    return result
