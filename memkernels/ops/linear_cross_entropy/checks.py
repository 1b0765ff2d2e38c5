"""What linear cross-entropy takes."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from memkernels.ops.checks import check_dense, check_flag, check_floating, check_number, check_same_device, check_shape

REDUCTIONS = ("mean", "sum", "none")


def check_tensors(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, shift: bool) -> None:
    """`weight` is the (V, d) tensor of a weight of any kind."""
    check_floating("x", x)
    if x.dim() == 0:
        raise ValueError("x: expected at least one dimension, got a scalar.")
    if x.shape[-1] == 0:
        raise ValueError(f"x: expected shape (..., d), d > 0, got {tuple(x.shape)}.")
    check_floating("weight", weight)
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight: expected shape (V, {x.shape[-1]}), V > 0, got {tuple(weight.shape)}.")
    check_dense("target", target)
    if target.dtype != torch.int64:
        raise TypeError(f"target: expected an int64 tensor, got {target.dtype}.")
    check_shape("target", target, x.shape[:-1], "the leading dimensions of x")
    if bias is not None:
        check_floating("bias", bias)
        check_shape("bias", bias, (weight.shape[0],), "the rows of weight")
    check_same_device("x", x, weight=weight, target=target, bias=bias)
    if shift and target.dim() == 0:
        raise ValueError("shift: expected a target of at least one dimension, got a scalar.")


def check_options(
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    shift: bool = False,
) -> None:
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, Integral):
        raise TypeError(f"ignore_index: expected an integer, got {ignore_index!r}.")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index: expected an integer of 64 bits, got {ignore_index}.")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}.")
    if softcap is not None:
        check_number("softcap", softcap, "a positive number or None", lambda value: 0 < value < float("inf"))
    check_number("label_smoothing", label_smoothing, "a number in [0, 1]", lambda value: 0 <= value <= 1)
    check_number("z_loss", z_loss, "a number from 0 up", lambda value: 0 <= value < float("inf"))
    check_flag("shift", shift)


def check_num_items(num_items: Any, x: Tensor, reduction: str) -> None:
    """Positive: a number, or a tensor of one on x's device, whose value a GPU asserts when it comes to it."""
    if num_items is None:
        return
    if reduction != "mean":
        raise ValueError(f"num_items: it is what reduction='mean' divides by, got it with {reduction!r}.")
    if not isinstance(num_items, Tensor):
        check_number("num_items", num_items, "a positive number", lambda value: 0 < value < float("inf"))
        return
    check_same_device("x", x, num_items=num_items)
    if num_items.numel() != 1 or num_items.dtype == torch.bool or num_items.is_complex():
        raise ValueError(
            f"num_items: expected a tensor of one number, got {num_items.dtype} of shape {tuple(num_items.shape)}."
        )
    if torch.compiler.is_compiling() or isinstance(num_items, FakeTensor):
        return
    if num_items.device.type == "cpu" and not num_items > 0:
        raise ValueError(f"num_items: expected a positive number, got {num_items.item()}.")
    if num_items.device.type == "cuda":
        torch._assert_async(num_items > 0, "num_items: expected a positive number.")
