"""Gated activation: operators, autograd Function and public function."""

from __future__ import annotations

import torch
from torch import Tensor

from memkernels._library import define, has_kernel, implement_with_triton
from memkernels.ops.checks import check_floating, check_like
from memkernels.ops.distinct import distinct
from memkernels.ops.gated_activation import reference
from memkernels.ops.once_differentiable import once_differentiable


def _fwd_fake(gate, up, activation):
    return gate.new_empty(gate.shape)


def _bwd_fake(dh, gate, up, activation):
    return gate.new_empty(gate.shape), gate.new_empty(0 if up is None else gate.shape)


define("gated_activation_fwd(Tensor gate, Tensor? up, str activation) -> Tensor", _fwd_fake)
define(
    "gated_activation_bwd(Tensor dh, Tensor gate, Tensor? up, str activation) -> (Tensor dgate, Tensor dup)", _bwd_fake
)
# In place, so that a backward pass that recomputes gate and up needs no memory beside them and dh: gate becomes dgate,
# up becomes dup, and dh becomes h. All three are contiguous.
define("gated_activation_bwd_(Tensor(a!) dh, Tensor(b!) gate, Tensor(c!)? up, str activation) -> ()")
implement_with_triton(
    "memkernels.ops.gated_activation.triton", "gated_activation_fwd", "gated_activation_bwd", "gated_activation_bwd_"
)


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation):
        ctx.activation = activation
        ctx.save_for_backward(gate, up)
        return torch.ops.memkernels.gated_activation_fwd(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        gate, up = ctx.saved_tensors
        dgate, dup = torch.ops.memkernels.gated_activation_bwd(dh, gate, up, ctx.activation)
        return dgate if ctx.needs_input_grad[0] else None, dup if ctx.needs_input_grad[1] else None, None


def check_activation(activation: str) -> None:
    if not isinstance(activation, str) or activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(reference.ACTIVATIONS)}, got {activation!r}.")


def gated_activation(gate: Tensor, up: Tensor | None = None, activation: str = "silu") -> Tensor:
    """The gated activation of a feed-forward layer, for those who fuse only that; `gated_mlp` spans the layer.

    h = act(gate) * up, or act(gate) without up, computed in float32 and rounded once, under autocast too. Shazeer 2020,
    arXiv 2002.05202.

    Args:
        gate: any shape; float32, bfloat16 or float16 (float64 is computed by the reference).
        up: like gate.
        activation: silu, gelu (by erf), gelu_tanh, relu or relu_squared (So et al. 2021, arXiv 2109.08668).

    Returns:
        h, like gate.

    Raises:
        TypeError: a dtype other than those above.
        ValueError: an unknown activation; a shape or device of up that is not gate's.

    Saved for backward: gate and up themselves, no copy.
    """
    check_activation(activation)
    check_floating("gate", gate)
    if up is not None:
        check_like("up", up, "gate", gate)
    if not has_kernel("gated_activation_fwd", gate):
        return reference.gated_activation(gate, up, activation)
    return _GatedActivation.apply(*distinct(gate, up), activation)
