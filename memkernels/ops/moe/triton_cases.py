"""The configurations of the experts' activation that are compiled ahead of time, and whose traffic is counted."""

from __future__ import annotations

import functools

import torch

from memkernels.ops.moe.triton import expert_activation_bwd, expert_activation_bwd_, expert_activation_fwd
from memkernels.testing.cases import KernelCase

ROWS, SIZE = 32, 2048


def _tensors(dtype, device, gated=True):
    """dh, gate_up and row_weight."""
    wide = torch.ones(ROWS, 2 * SIZE if gated else SIZE, dtype=dtype, device=device)
    return torch.ones(ROWS, SIZE, dtype=dtype, device=device), wide, torch.ones(ROWS, device=device)


def _forward(gated, activation, dtype, device):
    _, gate_up, row_weight = _tensors(dtype, device, gated)
    return gate_up, row_weight, expert_activation_fwd(gate_up, row_weight, gated, activation)


def _backward(gated, activation, dtype, device):
    dh, gate_up, row_weight = _tensors(dtype, device, gated)
    return dh, gate_up, row_weight, *expert_activation_bwd(dh, gate_up, row_weight, gated, activation)


def _backward_in_place(gated, activation, dtype, device):
    dh, gate_up, row_weight = _tensors(dtype, device, gated)
    drow_weight = expert_activation_bwd_(dh, gate_up, row_weight, gated, activation)
    return dh, gate_up, row_weight, dh, gate_up, drow_weight


KERNEL_CASES = [
    KernelCase(f"{name} {activation} {str(dtype)[6:]}", functools.partial(launch, gated, activation, dtype))
    for name, launch, gated, activation, dtype in (
        ("forward", _forward, True, "silu", torch.bfloat16),
        ("forward ungated", _forward, False, "relu", torch.bfloat16),
        ("backward", _backward, True, "gelu", torch.float32),
        ("backward in place", _backward_in_place, True, "silu", torch.bfloat16),
        ("backward in place ungated", _backward_in_place, False, "relu", torch.float16),
    )
]
