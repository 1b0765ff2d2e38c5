"""The optimizers' steps in plain PyTorch: the specification, and what computes where no kernel runs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from memkernels.optim import codes, rounding

Update = Callable[..., tuple[Tensor, ...]]


def adamw(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, *, step: int, lr: float, beta1: float, beta2: float, eps: float,
    weight_decay: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Parameter and moments after step `step`, counted from 1, in their dtype."""
    m = m + (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * (g * g)
    step_size, correction = lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)
    return p * (1 - lr * weight_decay) - step_size * m / (v.sqrt() * correction + eps), m, v


def lion(
    p: Tensor, g: Tensor, m: Tensor, *, step: int, lr: float, beta1: float, beta2: float, weight_decay: float
) -> tuple[Tensor, ...]:
    """Parameter and momentum, in their dtype; the same at every step."""
    direction = (m + (1 - beta1) * (g - m)).sign()
    return p * (1 - lr * weight_decay) - lr * direction, m + (1 - beta2) * (g - m)


def sgd(
    p: Tensor, g: Tensor, *buffer: Tensor, step: int, lr: float, momentum: float, dampening: float,
    weight_decay: float, nesterov: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Parameter and, with momentum, its buffer, after step `step`, in their dtype."""
    g = g + weight_decay * p
    if not buffer:
        return (p - lr * g,)
    b = momentum * buffer[0] + (1.0 if step == 1 else 1 - dampening) * g
    return p - lr * (g + momentum * b if nesterov else b), b


def step_group(
    update: Update,
    signed: Sequence[bool],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: Sequence[Tensor],
    absmax: Sequence[Tensor],
    remainders: Sequence[Tensor],
    steps: Sequence[int],
    indices: Sequence[int],
    origins: Sequence[int],
    seed: int,
    state_bits: int,
    grad_scale: float,
    grad_factor: Tensor | None = None,
    lr_factor: Tensor | None = None,
    **options: Any,
) -> None:
    """Calls `update` on the values of each parameter and stores what it returns; the arguments are an operator's."""
    scale = grad_scale if grad_factor is None else grad_scale * grad_factor
    if lr_factor is not None:
        options["lr"] = options["lr"] * lr_factor
    for i, (param, grad, step, index, origin) in enumerate(zip(params, grads, steps, indices, origins, strict=True)):
        random = functools.partial(
            rounding.random_bits, param.numel(), seed, index=index, step=step, device=param.device, origin=origin
        )
        exact = bool(remainders) and remainders[i].numel() > 0
        value = rounding.join(param, remainders[i]) if exact else param.float()
        at = [k * len(params) + i for k in range(len(signed))]
        values = [
            codes.decode(moments[j], absmax[j] if absmax else None, state_bits, sign, param.shape)
            for j, sign in zip(at, signed, strict=True)
        ]
        new, *new_moments = update(value, grad.float() * scale, *values, step=step, **options)
        if exact:
            for stored, part in zip((param, remainders[i]), rounding.split(new), strict=True):
                stored.copy_(part)
        elif param.dtype == torch.bfloat16:
            param.copy_(rounding.round_stochastic(new, random(tensor=0).view(new.shape)))
        else:
            param.copy_(new)
        for k, (j, sign, moment) in enumerate(zip(at, signed, new_moments, strict=True)):
            if state_bits == 16:
                moments[j].copy_(rounding.round_stochastic(moment, random(tensor=1 + k).view(moment.shape)))
                continue
            stored, maxima = codes.encode(moment, state_bits, sign)
            moments[j].copy_(stored)
            if maxima is not None:
                absmax[j].copy_(maxima)
