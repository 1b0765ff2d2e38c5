"""A model's zero_grad() for an optimizer that keeps gradients beside the parameters' `grad`."""

from __future__ import annotations

import types
import weakref

import torch


def drop_with(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Has the model's zero_grad() drop what is no parameter's `grad`, as long as there is the optimizer."""
    of_grads, of_model, reference = model.zero_grad, weakref.ref(model), weakref.ref(optimizer)

    def zero_grad(self: torch.nn.Module, set_to_none: bool = True) -> None:
        if self is not of_model():  # a copy, which has no optimizer
            type(self).zero_grad(self, set_to_none)
            return
        of_grads(set_to_none)
        if (alive := reference()) is not None:
            alive.zero_grad()

    # As a bound method, which a deep copy of the model has for itself.
    model.zero_grad = types.MethodType(zero_grad, model)  # type: ignore[method-assign]
