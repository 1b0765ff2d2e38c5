"""The optimizers' operators: one step of every parameter of a group in one call; the reference where no kernel runs.

params and grads: float32 or bfloat16, a gradient of its parameter's dtype, contiguous. moments: those of every
parameter for the first moment, then for the second, as `codes` stores them; absmax: likewise, empty from 16 bits on.
remainders: empty, or for each parameter the int16 that make an exact float32 of bfloat16, none where it is rounded.
steps: those of this call, from 1 on. indices: each parameter's place among all of the optimizer's, for the random bits;
origins: for them too, what the first element is of the whole parameter, of which this may be a part: a multiple of 256
where moments have 8 or 4 bits.
The gradient is multiplied by grad_scale and grad_factor first: together the clipping factor over the loss's scale,
negative to maximise. lr is multiplied by lr_factor. grad_factor and lr_factor are one float32 each on the parameters'
device, which the host does not wait for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memkernels._library import define, has_kernel
from memkernels.optim import reference

_GROUP = (
    "Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] moments, Tensor(c!)[] absmax, Tensor(d!)[] remainders,"
    " int[] steps, int[] indices, int[] origins, int seed, int state_bits, float grad_scale,"
    " Tensor? grad_factor, Tensor? lr_factor, float lr"
)


define(f"adamw_({_GROUP}, float beta1, float beta2, float eps, float weight_decay) -> ()")
define(f"lion_({_GROUP}, float beta1, float beta2, float weight_decay) -> ()")
define(f"sgd_({_GROUP}, float momentum, float dampening, float weight_decay, bool nesterov) -> ()")
# Of matrices (B, M, N): csrc/common/adafactor.h.
define(
    "factored_squares(Tensor grad, float grad_scale, Tensor? grad_factor) -> (Tensor, Tensor)",
    lambda grad, grad_scale, grad_factor: (
        grad.new_empty((*grad.shape[:2], 1), dtype=torch.float32),
        grad.new_empty((grad.shape[0], 1, grad.shape[2]), dtype=torch.float32),
    ),
)
define(
    "factored_square_sum(Tensor grad, Tensor rows, Tensor columns, float most, float grad_scale, Tensor? grad_factor)"
    " -> Tensor",
    lambda grad, rows, columns, most, grad_scale, grad_factor: grad.new_empty((), dtype=torch.float64),
)
# Of one parameter, with a moment or none.
define(f"adafactor_({_GROUP}, float beta1, float weight_decay, Tensor rows, Tensor columns, float most) -> ()")
# Of one matrix, on GPUs: the direction, bfloat16, of SGD's step without dampening at lr 1, and the momentum.
define(
    "muon_momentum_(Tensor(a!) direction, Tensor[] grads, Tensor(b!)[] moments, Tensor(c!)[] absmax, int[] steps,"
    " int[] indices, int[] origins, int seed, int state_bits, float grad_scale, Tensor? grad_factor, float momentum,"
    " bool nesterov) -> ()"
)
# The sum of the squares of all elements, float64.
define("square_sum(Tensor[] tensors) -> Tensor", lambda tensors: tensors[0].new_empty((), dtype=torch.float64))


def step_group(name: str, signed: Sequence[bool], group: Sequence[Any], options: dict[str, Any]) -> None:
    """Calls the operator `name`_ with `group`, its arguments up to grad_scale, and `options`, those from lr on.

    `signed` says of each moment which code it takes. The last of `group` may be a tensor, grad_factor, and lr too.
    """
    *tensors, scale = group
    lr = options["lr"]
    scales: tuple[Any, ...] = (*_number_and_factor(scale), lr if isinstance(lr, Tensor) else None)
    if isinstance(lr, Tensor):
        options = options | {"lr": 1.0}
    if has_kernel(f"{name}_", group[0][0]):
        getattr(torch.ops.memkernels, f"{name}_")(*tensors, *scales, *options.values())
    else:
        reference.step_group(getattr(reference, name), signed, *tensors, *scales, **options)


def square_sum(tensors: Sequence[Tensor]) -> Tensor:
    """The operator; at least one tensor."""
    if all(has_kernel("square_sum", tensor) for tensor in tensors):
        return torch.ops.memkernels.square_sum(tensors)
    return torch.stack([tensor.double().square().sum() for tensor in tensors]).sum()


def factored_squares(grad: Tensor, scale: float | Tensor) -> tuple[Tensor, Tensor]:
    """The sums of (scale g)^2 over the last dimension of grad (B, M, N), and over the one before it, as (B, M, 1) and
    (B, 1, N) in float32."""
    if has_kernel("factored_squares", grad):
        return torch.ops.memkernels.factored_squares(grad, *_number_and_factor(scale))
    by_rows, by_columns = (torch.linalg.vector_norm(grad, dim=dim, keepdim=True) for dim in (-1, -2))
    return by_rows.mul_(scale).square_(), by_columns.mul_(scale).square_()


def factored_square_sum(grad: Tensor, rows: Tensor, columns: Tensor, most: float, scale: float | Tensor) -> Tensor:
    """The sum of the squares of scale g min(rows columns, most), where there is a kernel."""
    return torch.ops.memkernels.factored_square_sum(grad, rows, columns, most, *_number_and_factor(scale))


def muon_momentum(arguments: Sequence[Any], momentum: float, nesterov: bool) -> Tensor:
    """A direction in bfloat16, where there is a kernel; `arguments` are the operator's from grads on, the last of them
    the scale, a number or a tensor."""
    *tensors, scale = arguments
    direction = torch.empty_like(tensors[0][0], dtype=torch.bfloat16)
    torch.ops.memkernels.muon_momentum_(direction, *tensors, *_number_and_factor(scale), momentum, nesterov)
    return direction


def _number_and_factor(scale: float | Tensor) -> tuple[float, Tensor | None]:
    """What an operator takes as grad_scale and grad_factor."""
    return (1.0, scale) if isinstance(scale, Tensor) else (scale, None)
