"""The activations of the gated MLP and their derivatives in float32, for every Triton kernel that needs them.

ACTIVATION is one of silu, gelu (by erf), gelu_tanh, relu, relu_squared. A NaN comes out as NaN from each of them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def act(x, ACTIVATION: tl.constexpr):
    """act(x); x in float32."""
    return act_and_grad(x, ACTIVATION)[0]


@triton.jit
def act_and_grad(x, ACTIVATION: tl.constexpr):
    """The pair act(x), act'(x); x in float32. relu has torch's derivative at 0: 0."""
    if ACTIVATION == "silu":
        gate = tl.sigmoid(x)
        y = x * gate
        return y, gate + y * (1.0 - gate)
    elif ACTIVATION == "gelu":
        # The normal distribution function and, scaled by x, its density.
        cdf = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        return x * cdf, cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh u) = sigmoid(2u), with u = sqrt(2/pi) (x + 0.044715 x^3).
        twice_u = 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)
        gate = tl.sigmoid(twice_u)
        y = x * gate
        # sigmoid(-2u), since the cubic would magnify the rounding of 1 - gate.
        return y, gate + y * tl.sigmoid(-twice_u) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif ACTIVATION == "relu":
        return tl.where(x <= 0.0, 0.0, x), tl.where(x <= 0.0, 0.0, 1.0)
    else:
        tl.static_assert(ACTIVATION == "relu_squared", "ACTIVATION: silu, gelu, gelu_tanh, relu or relu_squared")
        positive = tl.where(x <= 0.0, 0.0, x)
        return positive * positive, 2.0 * positive
