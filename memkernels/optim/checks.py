"""Checks of an optimizer's arguments, parameters and gradients, before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from memkernels.ops.checks import check_flag
from memkernels.optim.codes import STATE_BITS
from memkernels.optim.local import division_of, is_distributed

DTYPES = (torch.float32, torch.bfloat16)
ROUNDINGS = ("stochastic", "remainder")


def check_in_range(name: str, value: Any, low: float, high: float = math.inf, *, below: bool = False) -> None:
    """A number, or a tensor of one, in [low, high], or [low, high) with `below`."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name}: expected a number or a tensor of one element, got shape {tuple(value.shape)}.")
    if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}.")
    number = float(value)
    if not (low <= number < high if below else low <= number <= high) or math.isinf(number):
        raise ValueError(f"{name}: expected a number from {low} to {high}{' exclusively' * below}, got {number}.")


def check_step(max_norm: Any, loss_scale: Any) -> None:
    """The arguments of a step, above 0; max_norm may be None."""
    if max_norm is not None:
        check_in_range("max_norm", max_norm, 1e-38)
    check_in_range("loss_scale", loss_scale, 1e-38)


def check_moving(min_bytes: Any, prefetch: Any) -> None:
    """What `offload_states` and `offload_gradients` move, and read ahead."""
    for name, value, least in (("min_bytes", min_bytes, 1), ("prefetch", prefetch, 0)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected an integer of {least} or more, got {value!r}.")


def check_betas(betas: Any) -> None:
    """Two numbers from 0 to 1 exclusively."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas: expected two numbers, got {betas!r}.")
    for beta in betas:
        check_in_range("betas", beta, 0.0, 1.0, below=True)


def check_shared(options: dict[str, Any]) -> None:
    """What all optimizers have: maximize, and how states are kept by state_bits, rounding and seed."""
    check_flag("maximize", options["maximize"])
    if not isinstance(options["state_bits"], int) or options["state_bits"] not in STATE_BITS:
        raise ValueError(f"state_bits: expected one of {STATE_BITS}, got {options['state_bits']!r}.")
    if options["rounding"] not in ROUNDINGS:
        raise ValueError(f"rounding: expected one of {ROUNDINGS}, got {options['rounding']!r}.")
    seed = options["seed"]
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: expected an integer of 64 bits, got {seed!r}.")


def check_parameters(
    names: Sequence[str], parameters: Sequence[Tensor], takes_division: Callable[[Tensor], bool]
) -> None:
    """Of float32 or bfloat16, dense, on one device; DTensors that `takes_division`. Frozen ones are not looked at."""
    trained = [(name, p) for name, p in zip(names, parameters, strict=True) if p.requires_grad]
    for name, parameter in trained:
        if is_traceable_wrapper_subclass(parameter) and not takes_division(parameter):
            rows = " or a DTensor divided by rows" if is_distributed(parameter) else ""
            raise TypeError(f"{name}: expected a plain tensor{rows}, got {type(parameter).__name__}.")
        division = division_of(parameter)
        if division is not None and any(placement.is_partial() for placement in division[1]):
            raise TypeError(f"{name}: expected a DTensor of values, got one of which ranks have partial sums.")
        _check_dense(name, parameter)
        if parameter.dtype not in DTYPES:
            raise TypeError(f"{name}: expected float32 or bfloat16, got {parameter.dtype}.")
        if parameter.device != trained[0][1].device:
            first, device = trained[0][0], trained[0][1].device
            raise ValueError(f"{name}: expected device {device}, that of {first}, got {parameter.device}.")


def check_gradient(name: str, parameter: Tensor, grad: Tensor) -> None:
    """Dense, of its parameter's dtype, a DTensor where that is one."""
    _check_dense(f"the gradient of {name}", grad)
    if is_distributed(parameter) and not is_distributed(grad):
        raise TypeError(f"the gradient of {name}: expected a DTensor, as the parameter, got {type(grad).__name__}.")
    if grad.dtype != parameter.dtype:
        raise TypeError(f"the gradient of {name}: expected {parameter.dtype}, as the parameter, got {grad.dtype}.")


def _check_dense(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {tensor.layout}.")
    if tensor.is_complex():
        raise TypeError(f"{name}: expected real numbers, got {tensor.dtype}.")
