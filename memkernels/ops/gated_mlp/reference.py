"""The gated MLP in plain PyTorch: the specification."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from memkernels.ops.gated_activation.reference import gated_activation
from memkernels.ops.layer_norm.reference import layer_norm
from memkernels.ops.lora_linear.reference import row_dropout
from memkernels.ops.rms_norm.reference import rms_norm
from memkernels.ops.weights import Weight, base_of, linear


def gated_mlp(
    x: Tensor,
    w_gate: Weight | None,
    w_up: Weight,
    w_down: Weight,
    *,
    activation: str = "silu",
    norm: str = "rms",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_offset: float = 0.0,
    post_norm_weight: Tensor | None = None,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """y = (act(n w_gate^T + b_gate) * (n w_up^T + b_up)) w_down^T + b_down, or its norm, with n = x or its norm."""
    n = x
    if norm_weight is not None and norm == "rms":
        n = cast(Tensor, rms_norm(x, norm_weight, norm_eps, weight_offset=norm_offset)).to(base_of(w_up).dtype)
    elif norm_weight is not None:
        n = cast(Tensor, layer_norm(x, norm_weight, norm_bias, norm_eps)).to(base_of(w_up).dtype)
    up = linear(n, w_up, b_up)
    if w_gate is None:
        hidden = gated_activation(up, None, activation)
    else:
        hidden = gated_activation(linear(n, w_gate, b_gate), up, activation)
    if seed is not None and dropout_p > 0.0:
        hidden = row_dropout(hidden.flatten(0, -2), seed, dropout_p, 0, hidden.dtype).view(hidden.shape)
    y = linear(hidden, w_down, b_down)
    if post_norm_weight is None:
        return y
    return cast(Tensor, rms_norm(y, post_norm_weight, norm_eps, weight_offset=norm_offset))
