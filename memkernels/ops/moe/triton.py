"""The activation between an expert's two products for GPUs: each program one row, block by block of its columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memkernels.ops.activations_triton import act, act_and_grad

BLOCK = 1024


@triton.jit
def _expert_activation_fwd_kernel(gate_up_ptr, row_weight_ptr, h_ptr, size, GATED: tl.constexpr,
                                  ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """h = row_weight act(gate) up, gate and up the halves of a row of gate_up, `size` each. Moves each once."""
    row = tl.program_id(0).to(tl.int64)
    gate_ptr = gate_up_ptr + row * (2 * size if GATED else size)
    weight = tl.load(row_weight_ptr + row)
    for first in range(0, size, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        mask = columns < size
        h = act(tl.load(gate_ptr + columns, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
        if GATED:
            h *= tl.load(gate_ptr + size + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(h_ptr + row * size + columns, (h * weight).to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _expert_activation_bwd_kernel(dh_ptr, gate_up_ptr, row_weight_ptr, h_ptr, dgate_up_ptr, drow_weight_ptr, size,
                                  GATED: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """dgate = w dh up act'(gate), dup = w dh act(gate), dw = <dh, act(gate) up>, h as in forward; w is row_weight.

    Outputs may be the inputs. Moves each once.
    """
    row = tl.program_id(0).to(tl.int64)
    gate = row * (2 * size if GATED else size)
    weight = tl.load(row_weight_ptr + row)
    products = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, size, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        mask = columns < size
        value, derivative = act_and_grad(
            tl.load(gate_up_ptr + gate + columns, mask=mask, other=0.0).to(tl.float32), ACTIVATION
        )
        dh = tl.load(dh_ptr + row * size + columns, mask=mask, other=0.0).to(tl.float32)
        if GATED:
            up = tl.load(gate_up_ptr + gate + size + columns, mask=mask, other=0.0).to(tl.float32)
            dup = weight * dh * value
            tl.store(dgate_up_ptr + gate + size + columns, dup.to(dgate_up_ptr.dtype.element_ty), mask=mask)
            value *= up
            derivative *= up
        dgate = weight * dh * derivative
        tl.store(dgate_up_ptr + gate + columns, dgate.to(dgate_up_ptr.dtype.element_ty), mask=mask)
        tl.store(h_ptr + row * size + columns, (weight * value).to(h_ptr.dtype.element_ty), mask=mask)
        products += dh * value
    tl.store(drow_weight_ptr + row, tl.sum(products))


def expert_activation_fwd(gate_up: Tensor, row_weight: Tensor, gated: bool, activation: str) -> Tensor:
    gate_up, row_weight = gate_up.contiguous(), row_weight.contiguous()
    rows, width = gate_up.shape
    h = gate_up.new_empty(rows, width // 2 if gated else width)
    if rows:
        _expert_activation_fwd_kernel[(rows,)](
            gate_up, row_weight, h, h.shape[1], GATED=gated, ACTIVATION=activation, BLOCK=BLOCK
        )
    return h


def _backward(dh, gate_up, row_weight, dgate_up, gated, activation) -> Tensor:
    """drow_weight; dh becomes h."""
    drow_weight = torch.empty_like(row_weight)
    rows, size = dh.shape
    if rows:
        _expert_activation_bwd_kernel[(rows,)](
            dh, gate_up, row_weight, dh, dgate_up, drow_weight, size, GATED=gated, ACTIVATION=activation, BLOCK=BLOCK
        )
    return drow_weight


def expert_activation_bwd(
    dh: Tensor, gate_up: Tensor, row_weight: Tensor, gated: bool, activation: str
) -> tuple[Tensor, Tensor]:
    gate_up = gate_up.contiguous()
    dgate_up = torch.empty_like(gate_up)
    return dgate_up, _backward(dh, gate_up, row_weight.contiguous(), dgate_up, gated, activation)


def expert_activation_bwd_(dh: Tensor, gate_up: Tensor, row_weight: Tensor, gated: bool, activation: str) -> Tensor:
    return _backward(dh, gate_up, row_weight.contiguous(), gate_up, gated, activation)
