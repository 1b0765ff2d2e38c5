"""A pre-norm decoder layer as one autograd Function, over the layers of its two sublayers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memkernels.ops.attention_block import block as attention_block
from memkernels.ops.attention_block.op import attention_block as attention_sublayer
from memkernels.ops.attention_block.op import plan_attention_block
from memkernels.ops.autocast import without_autocast
from memkernels.ops.distinct import distinct
from memkernels.ops.gated_mlp import block as gated_mlp
from memkernels.ops.gated_mlp.op import gated_mlp as mlp_sublayer
from memkernels.ops.gated_mlp.op import plan_gated_mlp
from memkernels.ops.gradient_sum import results
from memkernels.ops.once_differentiable import once_differentiable
from memkernels.ops.saved import compressible

# Of each sublayer beside x, and whether it has to be given.
_ARGUMENTS = {
    name: {one.name: one.default is one.empty for one in list(inspect.signature(op).parameters.values())[1:]}
    for name, op in (("attention", attention_sublayer), ("mlp", mlp_sublayer))
}


@dataclass(frozen=True)
class Plan:
    """What is static of one call."""

    attention: attention_block.Plan
    mlp: gated_mlp.Plan

    def bind(
        self, context: attention_block.Context, tensors: tuple[Tensor, ...]
    ) -> tuple[attention_block.Layer, gated_mlp.Layer]:
        first = self.attention.num_tensors
        return self.attention.bind(context, tensors[:first]), self.mlp.bind(tensors[first:])


def _added(y: Tensor, residual: Tensor) -> Tensor:
    """y + residual, in y's memory where it has the sum's dtype."""
    return y.add_(residual) if y.dtype == residual.dtype else y + residual


class _DecoderLayer(torch.autograd.Function):
    """Saves x (B, S, d), attention's out and lse, s of an adapter of w_down, the context and the parameters."""

    @staticmethod
    def forward(ctx, plan, x, context_but_sinks, sinks, *tensors):
        context = attention_block.Context._make((*context_but_sinks, sinks))
        ctx.plan = plan
        with without_autocast(x):
            attention, mlp = plan.bind(context, tensors)
            rows = x.reshape(-1, x.shape[-1])
            y, out, lse = attention.forward(x)
            h = _added(y, rows)
            needed = ctx.needs_input_grad[4 + plan.attention.num_tensors :]
            y, s = mlp.forward(h, plan.mlp.needs_low_rank(needed))
            y = _added(y, h)
        ctx.save_for_backward(x, compressible(out), lse, s, *context, *tensors)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        plan = ctx.plan
        x, out, lse, s, *rest = ctx.saved_tensors
        width = len(attention_block.Context._fields)
        context, tensors = attention_block.Context._make(rest[:width]), tuple(rest[width:])
        x_needed, _, sinks_needed, *needed = ctx.needs_input_grad[1:]
        first = plan.attention.num_tensors
        attention_needed = x_needed or sinks_needed or any(needed[:first])
        with without_autocast(x):
            attention, mlp = plan.bind(context, tensors)
            rows, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
            of_mlp = gated_mlp.Gradients(plan.mlp, tensors[first:], attention_needed, needed[first:], rows.shape[0])
            projected, s_of_o = attention.project(out)
            h = _added(projected, rows)
            del projected
            dh = mlp.backward(dy.to(plan.mlp.dtype), h, s, of_mlp)
            del h
            of_attention = attention_block.Gradients(
                plan.attention, tensors[:first], x_needed, sinks_needed, needed[:first]
            )
            dx = None
            if attention_needed and dh is not None:
                dh = _added(dh, dy)
                dx = attention.backward(dh.to(plan.attention.dtype), x, out, lse, of_attention, s_of_o)
                if x_needed and dx is not None:
                    dx = _added(dx, dh.view(x.shape))
        gradients = (*results(of_attention.sums), *results(of_mlp.sums))
        return None, dx if x_needed else None, None, of_attention.sinks, *gradients


def decoder_layer(x: Tensor, attention: Mapping[str, Any], mlp: Mapping[str, Any]) -> Tensor:
    """A whole pre-norm decoder layer that keeps x and what attention's backward needs, and no hidden layer.

    h = x + `ops.attention_block`(x, **attention); y = h + `ops.gated_mlp`(h, **mlp).

    Args:
        x: (B, S, d), or packed (T, d) or (1, T, d); float32, bfloat16 or float16 (float64: by the reference).
        attention: the arguments of `ops.attention_block` beside x, by name: w_q, w_k, w_v, w_o, num_heads, ...
        mlp: the arguments of `ops.gated_mlp` beside x, by name: w_gate, w_up, w_down, ...

    Returns:
        y, like x (under autocast, of the dtype that x and autocast's promote to).

    Raises:
        TypeError, ValueError: as the two do; an argument that neither takes.

    Saved for backward: x, d elements a token, out, H Dv elements, and lse, 4 H bytes, of an adapter of w_down its
    r elements, beside the parameters, cos and sin. Backward recomputes the norms, q, k and v, the output projection,
    gate and up, tile by tile over tokens where `ops.gated_mlp` has tiles, and neither attention nor the down product:
    what selective checkpointing does that keeps the attention operator's outputs.
    """
    _check_arguments("attention", attention, attention_sublayer)
    _check_arguments("mlp", mlp, mlp_sublayer)
    x_in, attention_plan, context, attention_tensors, attention_kernels = plan_attention_block(x, **attention)
    mlp_plan, mlp_tensors, mlp_seed, mlp_kernels = plan_gated_mlp(x, **mlp)
    if attention_kernels and mlp_kernels:
        plan, tensors = Plan(attention_plan, mlp_plan), (*attention_tensors, *mlp_tensors)
        return _DecoderLayer.apply(plan, x_in, tuple(context[:-1]), context.sinks, *distinct(*tensors)).view(x.shape)
    h = x + attention_sublayer(x, **{**attention, "seed": context.seed})
    return h + mlp_sublayer(h, **{**mlp, "seed": mlp_seed})


def _check_arguments(name: str, given: Mapping[str, Any], op: Callable) -> None:
    """Those of an op beside x, by name."""
    if not isinstance(given, Mapping):
        raise TypeError(f"{name}: expected the arguments of ops.{op.__name__} by name, got {type(given).__name__}.")
    arguments = _ARGUMENTS[name]
    for argument in given:
        if argument not in arguments:
            raise TypeError(f"{name}: ops.{op.__name__} takes no {argument!r} beside x.")
    for argument, required in arguments.items():
        if required and argument not in given:
            raise TypeError(f"{name}: expected {argument!r}, which ops.{op.__name__} needs, got none.")
