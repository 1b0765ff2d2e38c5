"""The configurations of the gated activation that are compiled ahead of time, and whose traffic is counted."""

from __future__ import annotations

import functools

import torch

from memkernels.ops.gated_activation.triton import gated_activation_bwd, gated_activation_bwd_, gated_activation_fwd
from memkernels.testing.cases import KernelCase

SHAPE = (32, 2816)


def _tensors(count, dtype, device):
    return [torch.ones(SHAPE, dtype=dtype, device=device) for _ in range(count)]


def _forward(activation, dtype, device):
    gate, up = _tensors(2, dtype, device)
    return gate, up, gated_activation_fwd(gate, up, activation)


def _backward(activation, dtype, device):
    dh, gate, up = _tensors(3, dtype, device)
    return dh, gate, up, *gated_activation_bwd(dh, gate, up, activation)


def _backward_in_place(activation, dtype, device):
    dh, gate, up = _tensors(3, dtype, device)
    gated_activation_bwd_(dh, gate, up, activation)
    return dh, gate, up, dh, gate, up


def _ungated(activation, dtype, device):
    (gate,) = _tensors(1, dtype, device)
    return gate, gated_activation_fwd(gate, None, activation)


KERNEL_CASES = [
    KernelCase(f"{name} {activation} {str(dtype)[6:]}", functools.partial(launch, activation, dtype))
    for name, launch, activation, dtype in (
        ("forward", _forward, "silu", torch.bfloat16),
        ("backward", _backward, "gelu", torch.float32),
        ("backward in place", _backward_in_place, "silu", torch.bfloat16),
        ("backward in place", _backward_in_place, "gelu_tanh", torch.float16),
        ("ungated", _ungated, "relu_squared", torch.bfloat16),
    )
]
