"""The norms of a block op: RMS or layer norm, or none, described and bound as projections are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memkernels._library import has_kernel
from memkernels.ops.checks import (
    check_dtype_or_float32,
    check_eps,
    check_finite,
    check_floating,
    check_parameter,
    check_same_device,
    check_shape,
)
from memkernels.ops.gradient_sum import GradientSum

KINDS = ("rms", "layer")


@dataclass(frozen=True)
class NormDescription:
    """What is static of a norm: its kind, "rms", "layer" or "none", and its constants."""

    kind: str = "none"
    eps: float = 0.0
    weight_offset: float = 0.0
    has_bias: bool = False

    @property
    def num_tensors(self) -> int:
        return 0 if self.kind == "none" else 1 + self.has_bias

    def bind(self, tensors: Sequence[Tensor]) -> Norm:
        return Norm(self, *tensors)


@dataclass(frozen=True)
class Norm:
    """n = norm(x) over the last dimension, by the operators of `ops.rms_norm` or `ops.layer_norm`; x itself without."""

    description: NormDescription
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for tensor in (self.weight, self.bias) if tensor is not None)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """n, like x, and the statistics that backward takes: (), (rstd,) or (mean, rstd)."""
        of = self.description
        if self.weight is None:
            return x, ()
        if of.kind == "rms":
            n, _, rstd = torch.ops.memkernels.rms_norm_fwd(x, None, self.weight, of.eps, of.weight_offset)
            return n, (rstd,)
        n, _, mean, rstd = torch.ops.memkernels.layer_norm_fwd(x, None, self.weight, self.bias, of.eps)
        return n, (mean, rstd)

    def backward(
        self, dn: Tensor, x: Tensor, statistics: tuple[Tensor, ...], sums: Sequence[GradientSum | None]
    ) -> Tensor:
        """dx; adds the gradients of `tensors` to the sums that are there."""
        of = self.description
        if self.weight is None:
            return dn
        dn = dn.to(x.dtype)
        wanted = [total is not None for total in sums]
        if of.kind == "rms":
            dx, *terms = torch.ops.memkernels.rms_norm_bwd(
                dn, None, x, self.weight, *statistics, of.weight_offset, wanted[0]
            )
        else:
            bias_wanted = of.has_bias and wanted[1]
            dx, *terms = torch.ops.memkernels.layer_norm_bwd(
                dn, None, x, self.weight, *statistics, wanted[0], bias_wanted
            )
        for total, term in zip(sums, terms, strict=False):
            if total is not None:
                total.add(term)
        return dx

    def has_kernel(self, x: Tensor) -> bool:
        """Whether the operators run for x; otherwise the block's reference computes."""
        operator = {"rms": "rms_norm_fwd", "layer": "layer_norm_fwd"}.get(self.description.kind)
        return operator is None or has_kernel(operator, x)


def make_norm(
    x: Tensor, kind: str, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float
) -> Norm:
    """The norm that a block's arguments norm, norm_weight, norm_bias, norm_eps and norm_offset describe, checked."""
    if kind not in KINDS:
        raise ValueError(f"norm: expected one of {', '.join(KINDS)}, got {kind!r}.")
    if bias is not None and (weight is None or kind != "layer"):
        raise ValueError(f"norm_bias: expected None without norm_weight and norm='layer', got {type(bias).__name__}.")
    check_eps("norm_eps", eps)
    check_finite("norm_offset", weight_offset)
    if weight_offset and kind == "layer":
        raise ValueError(f"norm_offset: expected 0 with norm='layer', got {weight_offset}.")
    if weight is None:
        return Norm(NormDescription())
    for name, tensor in (("norm_weight", weight), ("norm_bias", bias)):
        if tensor is not None:
            check_parameter(name, tensor, x, (x.shape[-1],), "the last dimension of x")
    return Norm(NormDescription(kind, float(eps), float(weight_offset), bias is not None), weight, bias)


def make_rms_norm(name: str, x: Tensor, size: int, weight: Tensor | None, eps: float, weight_offset: float,
                  dtype: torch.dtype) -> Norm:  # fmt: skip
    """An RMS norm within a block, of rows of `size` elements of `dtype`; none without weight."""
    if weight is None:
        return Norm(NormDescription())
    check_floating(name, weight)
    check_shape(name, weight, (size,), "the size of what it norms")
    check_same_device("x", x, **{name: weight})
    check_dtype_or_float32(name, weight, dtype, "the products")
    return Norm(NormDescription("rms", float(eps), float(weight_offset)), weight)
