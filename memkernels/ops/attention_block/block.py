"""The attention half-block as one autograd Function over projections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from memkernels.ops.attention.backends import operators
from memkernels.ops.autocast import without_autocast
from memkernels.ops.block_norm import Norm, NormDescription
from memkernels.ops.distinct import distinct
from memkernels.ops.gradient_sum import GradientSum, gradient_sums, results
from memkernels.ops.input_grad_first import forward_and_low_rank
from memkernels.ops.once_differentiable import once_differentiable
from memkernels.ops.projection import Description, Projection, split_by
from memkernels.ops.saved import compressible
from memkernels.ops.shared_input import add_gradients_all, forward_all, input_grad_all


@dataclass(frozen=True)
class Plan:
    """What is static of one call.

    `scores` is (scale, window_left, window_right, softcap, dropout_p); `attention` is what computes attention, as
    `select_implementation` names it.
    """

    norm: NormDescription
    q_norm: NormDescription
    k_norm: NormDescription
    q: Description
    k: Description
    v: Description
    o: Description
    post_norm: NormDescription
    num_heads: int
    interleaved: bool
    max_seqlen: int
    scores: tuple[float, int, int, float, float]
    deterministic: bool
    dtype: torch.dtype
    attention: str

    @property
    def parts(self) -> tuple[NormDescription | Description, ...]:
        """In the order of the Function's tensors."""
        return self.norm, self.q_norm, self.k_norm, self.q, self.k, self.v, self.o, self.post_norm

    @property
    def num_tensors(self) -> int:
        return sum(part.num_tensors for part in self.parts)

    def bind(self, context: Context, tensors: Sequence[Tensor]) -> Layer:
        norm, q_norm, k_norm, q, k, v, o, post_norm = split_by(self.parts, tensors)
        return Layer(
            self,
            context,
            self.norm.bind(norm),
            self.q_norm.bind(q_norm),
            self.k_norm.bind(k_norm),
            self.q.bind(q),
            self.k.bind(k),
            self.v.bind(v),
            self.o.bind(o),
            self.post_norm.bind(post_norm),
        )


class Context(NamedTuple):
    """What a call has beside x and the parameters. `sinks` is the one that has a gradient."""

    cos: Tensor | None
    sin: Tensor | None
    cu_seqlens: Tensor | None
    alibi_slopes: Tensor | None
    seed: Tensor | None
    sinks: Tensor | None


class Heads(NamedTuple):
    """q, k and v, (B, S, heads, size), and what the norms in front of them and their adapters need in backward."""

    n: Tensor
    statistics: tuple[Tensor, ...]
    q: Tensor
    k: Tensor
    v: Tensor
    before_norm: tuple[Tensor | None, Tensor | None]
    head_statistics: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
    low_rank: dict[int, Tensor]


@dataclass(frozen=True)
class Layer:
    """The norms and the projections, and their computations over x (B, S, d); a packed batch has B = 1."""

    plan: Plan
    context: Context
    norm: Norm
    q_norm: Norm
    k_norm: Norm
    q: Projection
    k: Projection
    v: Projection
    o: Projection
    post_norm: Norm

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """y (B S, d), and what backward needs: out (B, S, H, Dv) and lse; a packed batch's have no B."""
        heads = self._heads(x)
        attention_fwd, _ = operators(self.plan.attention)
        out, lse = attention_fwd(*self._attended(heads), *self._masks(), *self._options())
        del heads
        return self.project(out)[0], out, lse

    def project(self, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """y (B S, d) of the attention's output, and s of o's adapter."""
        y, s = forward_and_low_rank(self.o, self._rows(out), 0)
        return self.post_norm.forward(y)[0], s

    def backward(
        self, dy: Tensor, x: Tensor, out: Tensor, lse: Tensor, gradients: Gradients, s: Tensor | None = None
    ) -> Tensor | None:
        """dx (B, S, d) of dy (B S, d), None where it is not wanted; adds the others to their sums.

        s of o's adapter is made again unless it is given.
        """
        if self.post_norm.weight is not None:
            y, s = forward_and_low_rank(self.o, self._rows(out), 0, s)
            dy = self.post_norm.backward(dy, y, self.post_norm.forward(y)[1], gradients.post_norm)
            del y
        through, of_o = gradients.through_attention, {} if s is None else {0: s}
        p = add_gradients_all([self.o], [dy], self._rows(out), [gradients.o], input_grad=through, s=of_o)
        if not through:
            return None
        dout = input_grad_all([self.o], [dy], p).view(out.shape)
        heads = self._heads(x)
        _, attention_bwd = operators(self.plan.attention)
        dq, dk, dv, dsinks = attention_bwd(
            dout, None, *self._attended(heads), out, lse, *self._masks(), *self._options(), self.plan.deterministic
        )
        del dout
        gradients.sinks = dsinks if gradients.sinks_needed else None
        if not gradients.through_heads:
            return None
        dq, dk, dv = (tensor.view(heads_of.shape) for tensor, heads_of in zip((dq, dk, dv), heads[2:5], strict=True))
        n, statistics, low_rank = heads.n, heads.statistics, heads.low_rank
        before_norm, head_statistics = heads.before_norm, heads.head_statistics
        del heads
        dq, dk = self._unrotated(dq, dk)
        dq = self._head_norm_backward(self.q_norm, dq, before_norm[0], head_statistics[0], gradients.q_norm)
        dk = self._head_norm_backward(self.k_norm, dk, before_norm[1], head_statistics[1], gradients.k_norm)
        del before_norm
        projections, dys = (self.q, self.k, self.v), tuple(map(self._rows, (dq, dk, dv)))
        del dq, dk, dv
        sums = (gradients.q, gradients.k, gradients.v)
        p = add_gradients_all(projections, dys, n, sums, input_grad=gradients.through_norm, s=low_rank)
        if not gradients.through_norm:
            return None
        dn = input_grad_all(projections, dys, p)
        return self.norm.backward(dn.view(x.shape), x, statistics, gradients.norm)

    def _heads(self, x: Tensor) -> Heads:
        n, statistics = self.norm.forward(x)
        n = n.reshape(-1, n.shape[-1]).to(self.plan.dtype)
        num_heads = self.plan.num_heads
        num_kv_heads = self.k.out_features * num_heads // self.q.out_features
        products, low_rank = forward_all((self.q, self.k, self.v), n)
        q, k, v = (
            tensor.view(*x.shape[:-1], heads, tensor.shape[1] // heads)
            for tensor, heads in zip(products, (num_heads, num_kv_heads, num_kv_heads), strict=True)
        )
        del products
        before_norm = tuple(None if norm.weight is None else t for norm, t in ((self.q_norm, q), (self.k_norm, k)))
        (q, q_statistics), (k, k_statistics) = self.q_norm.forward(q), self.k_norm.forward(k)
        if self.context.cos is not None:
            q, k = torch.ops.memkernels.rotary_fwd(q, k, self.context.cos, self.context.sin, self.plan.interleaved)
        return Heads(n, statistics, q, k, v, (before_norm[0], before_norm[1]), (q_statistics, k_statistics), low_rank)

    def _attended(self, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v in attention's layout."""
        if self.context.cu_seqlens is None:
            return heads.q, heads.k, heads.v
        return heads.q[0], heads.k[0], heads.v[0]

    def _unrotated(self, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor]:
        if self.context.cos is None:
            return dq, dk
        return torch.ops.memkernels.rotary_bwd(dq, dk, self.context.cos, self.context.sin, self.plan.interleaved)

    def _head_norm_backward(self, norm: Norm, grad: Tensor, before: Tensor | None, statistics, sums) -> Tensor:
        return grad if before is None else norm.backward(grad, before, statistics, sums)

    def _masks(self) -> tuple[Tensor | None, ...]:
        of = self.context
        return of.cu_seqlens, of.cu_seqlens, of.alibi_slopes, of.sinks, of.seed

    def _options(self) -> tuple[float | int, ...]:
        return self.plan.max_seqlen, self.plan.max_seqlen, *self.plan.scores

    def _rows(self, heads: Tensor) -> Tensor:
        """(B S, heads * size) of (B, S, heads, size) or (T, heads, size)."""
        return heads.reshape(-1, heads.shape[-2] * heads.shape[-1])


class Gradients:
    """Which gradients are wanted, and the sums of those of the tensors."""

    def __init__(self, plan: Plan, tensors: Sequence[Tensor], x: bool, sinks: bool, needed: Sequence[bool]):
        self.sums = gradient_sums(tensors, needed)
        self.sinks_needed, self.sinks = sinks, None
        self.norm: tuple[GradientSum | None, ...]
        groups = split_by(plan.parts, self.sums)
        self.norm, self.q_norm, self.k_norm, self.q, self.k, self.v, self.o, self.post_norm = groups
        self.through_norm = x or any(total is not None for total in self.norm)
        in_front_of_heads = self.q_norm + self.k_norm + self.q + self.k + self.v
        self.through_heads = self.through_norm or any(total is not None for total in in_front_of_heads)
        self.through_attention = self.through_heads or sinks


class _AttentionBlock(torch.autograd.Function):
    """Saves x, out, lse, the context and the parameters."""

    @staticmethod
    def forward(ctx, plan, x, context_but_sinks, sinks, *tensors):
        context = Context._make((*context_but_sinks, sinks))
        ctx.plan = plan
        with without_autocast(x):
            y, out, lse = plan.bind(context, tensors).forward(x)
        ctx.save_for_backward(x, compressible(out), lse, *context, *tensors)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        plan = ctx.plan
        x, out, lse, *rest = ctx.saved_tensors
        context, tensors = Context._make(rest[: len(Context._fields)]), rest[len(Context._fields) :]
        x_needed, _, sinks_needed, *needed = ctx.needs_input_grad[1:]
        with without_autocast(x):
            gradients = Gradients(plan, tensors, x_needed, sinks_needed, needed)
            dx = plan.bind(context, tensors).backward(dy.reshape(-1, dy.shape[-1]), x, out, lse, gradients)
        return None, dx if x_needed else None, None, gradients.sinks, *results(gradients.sums)


def attention_block(x: Tensor, plan: Plan, context: Context, tensors: Sequence[Tensor]) -> Tensor:
    """`ops.attention_block` of a plan: x (B, S, d), or (1, T, d) packed."""
    return _AttentionBlock.apply(plan, x, tuple(context[:-1]), context.sinks, *distinct(*tensors))
