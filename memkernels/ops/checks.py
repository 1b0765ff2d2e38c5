"""Checks of arguments, shared by the public ops. Each error names the argument, what it got and what it takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from memkernels._library import FLOATING

# Classes of tensors that are no more than their values; a FakeTensor stands for one of them in a trace.
PLAIN_TENSORS = (torch.nn.Parameter, Tensor, FakeTensor)


def check_dense(name: str, tensor: Tensor) -> None:
    """A tensor, and no sparse or nested one."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}.")
    if tensor.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got a nested one.")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got one of layout {tensor.layout}.")


def check_floating(name: str, tensor: Tensor) -> None:
    """A dense float32, bfloat16, float16 or (computed by the reference) float64 tensor."""
    check_dense(name, tensor)
    check_dtype(name, tensor.dtype)


def check_dtype(name: str, dtype: Any) -> None:
    if dtype not in (*FLOATING, torch.float64):
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {dtype}.")


def check_parameter_dtype(dtype: Any) -> None:
    """A layer's dtype; None is torch's default."""
    if dtype is not None:
        check_dtype("dtype", dtype)


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)} ({meaning}), got {tuple(tensor.shape)}.")


def check_same_device(reference_name: str, reference: Tensor, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        check_dense(name, tensor)
        if tensor.device != reference.device:
            raise ValueError(
                f"{name}: expected device {reference.device}, that of {reference_name}, got {tensor.device}."
            )


def check_dtype_or_float32(name: str, tensor: Tensor, dtype: torch.dtype, reference_name: str) -> None:
    if tensor.dtype not in (dtype, torch.float32):
        float32 = "" if dtype == torch.float32 else ", or float32"
        raise TypeError(f"{name}: expected {dtype}, as {reference_name}{float32}, got {tensor.dtype}.")


def check_parameter(name: str, tensor: Tensor, x: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """A norm's parameter: of the given shape, on x's device, of x's dtype or float32."""
    check_floating(name, tensor)
    check_shape(name, tensor, shape, meaning)
    check_same_device("x", x, **{name: tensor})
    check_dtype_or_float32(name, tensor, x.dtype, "x")


def check_like(name: str, tensor: Tensor, reference_name: str, reference: Tensor) -> None:
    """Same shape, dtype and device as another argument."""
    check_floating(name, tensor)
    check_shape(name, tensor, tuple(reference.shape), f"that of {reference_name}")
    check_same_device(reference_name, reference, **{name: tensor})
    if tensor.dtype != reference.dtype:
        raise TypeError(f"{name}: expected {reference.dtype}, as {reference_name}, got {tensor.dtype}.")


def check_number(name: str, value: Any, expected: str, fits: Callable[[Any], bool]) -> None:
    """A number, no tensor, that `fits`; torch.export has numbers of its own for those that it keeps free."""
    if isinstance(value, bool) or not isinstance(value, (Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: expected {expected}, got {value!r}.")
    if not fits(value):
        raise ValueError(f"{name}: expected {expected}, got {value}.")


def check_integer(name: str, value: Any, expected: str = "a positive integer", least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, (Integral, torch.SymInt)):
        raise TypeError(f"{name}: expected {expected}, got {value!r}.")
    if value < least:
        raise ValueError(f"{name}: expected {expected}, got {value}.")


def check_finite(name: str, value: Any) -> None:
    check_number(name, value, "a finite number", lambda number: -math.inf < number < math.inf)


def check_eps(name: str, eps: Any) -> None:
    check_number(name, eps, "a finite number from 0 up", lambda number: 0 <= number < math.inf)


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}.")


def check_dropout_p(dropout_p: Any) -> None:
    check_number("dropout_p", dropout_p, "a number in [0, 1)", lambda number: 0 <= number < 1)


def check_tile_tokens(tile_tokens: Any) -> None:
    if tile_tokens is not None:
        check_integer("tile_tokens", tile_tokens, "a positive integer or None")


def check_module(model: Any) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}.")
