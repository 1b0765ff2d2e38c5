"""Backward passes that have no derivative of their own."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


class _NoSecondDerivative(torch.autograd.Function):
    """The first `count` tensors, as if computed from the others."""

    @staticmethod
    def forward(ctx, op: str, count: int, *tensors: Tensor):
        ctx.op = op
        return tuple(gradient.view_as(gradient) for gradient in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f"{ctx.op}: its gradients have no derivative of their own: got a second backward, through gradients that"
            " create_graph=True made."
        )


class _Context:
    """A Function's context whose saved tensors are unpacked once: hooks and checkpointing depend on it."""

    def __init__(self, ctx: Any):
        self._ctx = ctx
        self.saved_tensors = ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def once_differentiable(backward: Callable) -> Callable:
    """Of an autograd Function, a backward whose gradients cannot be differentiated: whoever tries gets a RuntimeError.

    torch's decorator ties it to incoming gradients that have a graph. A loss's, which is one, has none, and a second
    backward for some inputs alone does not come by: what the gradients owe to the saved tensors would be left out
    without a word. Here it is tied to those as well.
    """

    @wraps(backward)
    def without_graph(ctx: Any, *grads: Any):
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, *grads)
        context = _Context(ctx)
        with torch.no_grad():
            outputs = backward(context, *grads)
        sources = [of for of in (*grads, *context.saved_tensors) if of is not None and of.requires_grad]
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients = [output for output in outputs if output is not None]
        if not sources or not gradients:
            return outputs
        op = type(ctx).__name__.strip("_").removesuffix("Backward")
        marked = iter(_NoSecondDerivative.apply(op, len(gradients), *gradients, *sources))
        return tuple(None if output is None else next(marked) for output in outputs)

    return without_graph
