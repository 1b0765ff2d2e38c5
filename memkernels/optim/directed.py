"""Optimizers whose direction is not a function of each element alone: a moment and a step by SGD's operator."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memkernels.optim.agreement import on_all
from memkernels.optim.local import is_distributed, local_of
from memkernels.optim.operators import step_group
from memkernels.optim.optimizer import LowMemoryOptimizer
from memkernels.optim.rows import group_of_rows, is_divided_by_rows


class Stored(NamedTuple):
    """A parameter with what a step of it takes.

    `param`, `grad` and `state` are contiguous, and of a DTensor, `whole`, this rank's rows; `local` is what `param` is
    a copy of, or itself.
    `step` counts from 1; `place` is the parameter's among all of the optimizer's, `origin` where its random bits begin;
    `scale` multiplies the gradient.
    """

    whole: Tensor
    local: Tensor
    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    step: int
    place: int
    origin: int
    scale: float | Tensor


class DirectedOptimizer(LowMemoryOptimizer):
    """The base of optimizers that make a direction of a whole parameter, and step along it.

    Parameters are stepped one after the other; a step takes a few float32 tensors of its parameter's size.
    """

    elementwise = False

    @staticmethod
    def takes_division(parameter: Tensor) -> bool:
        return is_divided_by_rows(parameter)

    @abstractmethod
    def _step_along(self, several: Sequence[Stored], group: dict[str, Any]) -> None:
        """The step of one parameter with elements, or of all whose rows are divided among ranks."""

    def _step_in_memory(self, group: dict[str, Any], chosen: dict[int, Tensor], scale: float | Tensor) -> None:
        divided: list[Stored] = []
        for place, param in chosen.items():
            of = self._stored(group, place, param, scale)
            if is_distributed(param):
                divided.append(of)
            elif of.param.numel():
                self._step_along([of], group)
                _store(of)
        if divided:
            self._step_along(divided, group)
        for of in divided:
            _store(of)
        torch.autograd.graph.increment_version(list(chosen.values()))

    def _fetch(self, param: Tensor, then: Sequence[Tensor], fetched: ExitStack) -> None:
        """Of a parameter whose rows are divided on every rank or on none: a step of it exchanges them."""
        group = group_of_rows(param) if is_distributed(param) else None
        on_all(group, lambda: super(DirectedOptimizer, self)._fetch(param, then, fetched))

    def _stored(self, group: dict[str, Any], place: int, param: Tensor, scale: float | Tensor) -> Stored:
        assert param.grad is not None
        state = {key: local_of(value) for key, value in self._state_of(param, group).items()}
        state["step"].add_(1)
        signed_scale = -scale if group["maximize"] else scale
        local = local_of(param)
        dense = local if local.is_contiguous() else local.contiguous()
        return Stored(
            param, local, dense, local_of(param.grad).contiguous(), state, int(state["step"]), place,
            self._origin_of(param, group), signed_scale,
        )  # fmt: skip


def _store(of: Stored) -> None:
    """Writes back what was copied for the step."""
    if of.param is not of.local:
        of.local.copy_(of.param)


def through_moment(
    of: Stored, key: str, values: Tensor, group: dict[str, Any], *, scale: float | Tensor, momentum: float,
    dampening: float, nesterov: bool,
) -> Tensor:  # fmt: skip
    """b = momentum b + (1 - dampening) scale values, the moment `key`; returns it, or with nesterov scale values +
    momentum b. In float32."""
    result = torch.zeros_like(values, dtype=torch.float32)
    numbers = {
        "lr": -1.0, "momentum": momentum, "dampening": dampening, "weight_decay": 0.0, "nesterov": nesterov,
    }  # fmt: skip
    grads, moments, absmax, *others = moment_arguments(of, key, values.float(), group, scale)
    step_group("sgd", [True], ([result], grads, moments, absmax, [], *others), numbers)
    return result


def moment_arguments(
    of: Stored, key: str, values: Tensor, group: dict[str, Any], scale: float | Tensor
) -> tuple[Any, ...]:
    """Those of an operator from grads to the scale, without remainders, for the moment `key` of scale values."""
    absmax = [of.state[f"{key}_absmax"]] if f"{key}_absmax" in of.state else []
    # SGD's first step has no dampening; the moment is zero before it, so a later step says the same with it.
    return (
        [values], [of.state[key]], absmax, [of.step + 1], [of.place], [of.origin], group["seed"], group["state_bits"],
        scale,
    )  # fmt: skip


def step_along(
    of: Stored, direction: Tensor, group: dict[str, Any], *, lr: float | Tensor, size: float | Tensor
) -> None:
    """param = param (1 - lr weight_decay) - lr size direction; the direction is rounded to the parameter's dtype."""
    numbers = {
        "lr": lr, "momentum": 0.0, "dampening": 0.0, "weight_decay": float(group["weight_decay"]), "nesterov": False,
    }  # fmt: skip
    step_group("sgd", [], step_arguments(of, direction.to(of.param.dtype).contiguous(), group, (), size), numbers)


def step_arguments(
    of: Stored, grad: Tensor, group: dict[str, Any], moments: Sequence[str], scale: float | Tensor
) -> tuple[Any, ...]:
    """Those of an operator up to its hyperparameters, for a step of one parameter with these moments."""
    absmax = [of.state[f"{key}_absmax"] for key in moments if f"{key}_absmax" in of.state]
    remainders = [of.state["remainder"]] if "remainder" in of.state else []
    return (
        [of.param], [grad], [of.state[key] for key in moments], absmax, remainders, [of.step], [of.place], [of.origin],
        group["seed"], group["state_bits"], scale,
    )  # fmt: skip
