"""The gated activation for GPUs: one flat pass, each program one block of elements."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memkernels.ops.activations_triton import act, act_and_grad

BLOCK = 2048


@triton.jit
def _gated_activation_fwd_kernel(gate_ptr, up_ptr, h_ptr, n, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
                                 BLOCK: tl.constexpr):  # fmt: skip
    """h = act(gate) * up, or act(gate) where not GATED; n elements each.

    Reads gate and up and writes h, each once: 3 n elements, 2 n without up.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    h = act(tl.load(gate_ptr + offsets, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
    if GATED:
        h *= tl.load(up_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(h_ptr + offsets, h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gated_activation_bwd_kernel(dh_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, h_ptr, n, GATED: tl.constexpr,
                                 STORE_H: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """dgate = dh * up * act'(gate), dup = dh * act(gate), with STORE_H h = act(gate) * up; outputs may be the inputs.

    n elements each. Reads dh, gate and up and writes dgate, dup and h, each once: 6 n elements, 5 n without h; where
    not GATED neither up nor dup, 2 n less.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    value, derivative = act_and_grad(tl.load(gate_ptr + offsets, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
    dh = tl.load(dh_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(up_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dup_ptr + offsets, (dh * value).to(dup_ptr.dtype.element_ty), mask=mask)
        dh *= up
        value *= up
    tl.store(dgate_ptr + offsets, (dh * derivative).to(dgate_ptr.dtype.element_ty), mask=mask)
    if STORE_H:
        tl.store(h_ptr + offsets, value.to(h_ptr.dtype.element_ty), mask=mask)


def gated_activation_fwd(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    gate = gate.contiguous()
    up = up if up is None else up.contiguous()
    h, n = torch.empty_like(gate), gate.numel()
    if n:
        _gated_activation_fwd_kernel[(triton.cdiv(n, BLOCK),)](
            gate, up, h, n, GATED=up is not None, ACTIVATION=activation, BLOCK=BLOCK
        )
    return h


def _backward(dh, gate, up, dgate, dup, h, activation):
    n = gate.numel()
    if n:
        _gated_activation_bwd_kernel[(triton.cdiv(n, BLOCK),)](
            dh, gate, up, dgate, dup, h, n,
            GATED=up is not None, STORE_H=h is not None, ACTIVATION=activation, BLOCK=BLOCK,
        )  # fmt: skip


def gated_activation_bwd(dh: Tensor, gate: Tensor, up: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    dh, gate = dh.contiguous(), gate.contiguous()
    up = up if up is None else up.contiguous()
    dgate = torch.empty_like(gate)
    dup = gate.new_empty(0) if up is None else torch.empty_like(gate)
    _backward(dh, gate, up, dgate, dup, None, activation)
    return dgate, dup


def gated_activation_bwd_(dh: Tensor, gate: Tensor, up: Tensor | None, activation: str) -> None:
    _backward(dh, gate, up, gate, up, dh, activation)
