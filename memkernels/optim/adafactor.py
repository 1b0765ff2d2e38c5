"""Adafactor: a second moment of a matrix as a row and a column."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from memkernels.optim.checks import check_number
from memkernels.optim.directed import DirectedOptimizer, Stored, step_along, through_moment
from memkernels.optim.operators import square_sum
from memkernels.optim.optimizer import Moment
from memkernels.optim.rows import sum_over_ranks


class Adafactor(DirectedOptimizer):
    """Adafactor (Shazeer & Stern 2018, arXiv 1804.04235) as `torch.optim.Adafactor` has it, and a first moment:

        c = t^beta2_decay                     rho = min(lr, 1 / sqrt(t))         alpha = max(eps[1], RMS(p)) rho
        R = (1 - c) R + c rowmean(g^2)        C = (1 - c) C + c colmean(g^2)     V = R C / max(mean(R), eps[0])
        u = g / sqrt(max(V, eps[0]^2))        u = alpha u / max(1, RMS(u) / d)   m = beta1 m + (1 - beta1) u
        p = p (1 - lr weight_decay) - m, without beta1 p (1 - lr weight_decay) - u

    over the last two dimensions; a vector's V is (1 - c) V + c g^2 itself. The paper adds eps[0] to g^2 and has 0.01 in
    the place of lr; torch and this bound what is divided by.

    R and C take 4 (1 / M + 1 / N) bytes a parameter of a matrix (M, N), V of a vector 4, in float32; m takes 4, 2,
    1 + 4 / 256 or 1/2 + 4 / 128 bytes at 32, 16, 8 or 4 state_bits, stored as `AdamW` stores its first moment, and
    nothing without beta1. A step takes three tensors of a parameter's size in float32, one parameter at a time, and on
    a GPU waits for none. Of DTensors, as FSDP2 makes them, each rank has rows of R, V and m, and all of C.
    Checkpoints of `torch.optim.Adafactor` load, and torch's loads those without beta1. `params`, `maximize`,
    `state_bits`, `rounding` and `seed`, the step's arguments and what is raised are those of `AdamW`.

    Args:
        lr: the largest rho, and what weight_decay is multiplied by; a number, or a tensor of one.
        beta2_decay: at most 0.
        eps: None is the least difference of the parameter's dtype from 1.
        d: what RMS(u) is clipped to, from 1 up.
        weight_decay: decoupled, times lr.
        beta1: in [0, 1), or None.
    """

    operator = "sgd"
    not_in_torch = ("beta1",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        beta1: float | None = None,
        maximize: bool = False,
        state_bits: int = 32,
        rounding: str = "stochastic",
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr, "beta2_decay": beta2_decay, "eps": eps, "d": d, "weight_decay": weight_decay, "beta1": beta1,
            "maximize": maximize, "state_bits": state_bits, "rounding": rounding, "seed": seed,
        }  # fmt: skip
        super().__init__(params, defaults)

    def moments(self, group: dict[str, Any]) -> tuple[Moment, ...]:
        return () if group["beta1"] is None else (Moment("exp_avg", signed=True),)

    def float_states(self, shape: torch.Size) -> dict[str, tuple[int, ...]]:
        if len(shape) < 2:
            return {"variance": tuple(shape)}
        return {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])}

    def _check_options(self, group: dict[str, Any]) -> None:
        check_number("lr", group["lr"], 0.0)
        check_number("beta2_decay", group["beta2_decay"], -math.inf, 0.0)
        if not isinstance(group["eps"], (tuple, list)) or len(group["eps"]) != 2:
            raise ValueError(f"eps: expected two numbers, the first may be None, got {group['eps']!r}.")
        for value in group["eps"][group["eps"][0] is None :]:
            check_number("eps", value, 0.0)
        check_number("d", group["d"], 1.0)
        check_number("weight_decay", group["weight_decay"], 0.0)
        if group["beta1"] is not None:
            check_number("beta1", group["beta1"], 0.0, 1.0, below=True)

    def _numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        return {}

    def _step_along(self, several: Sequence[Stored], group: dict[str, Any]) -> None:
        for of in several:
            self._step_one(of, group)

    def _step_one(self, of: Stored, group: dict[str, Any]) -> None:
        lr, (least, least_rms), beta1 = float(group["lr"]), group["eps"], group["beta1"]
        least = torch.finfo(of.param.dtype).eps if least is None else least
        grad = of.grad.float() * of.scale
        u = scaled(grad, of.state, of.step ** group["beta2_decay"], least, of.whole)
        alpha = rms(of.param, of.whole).clamp(min=least_rms) * min(lr, of.step**-0.5)
        size: float | Tensor = alpha / (rms(u, of.whole) / group["d"]).clamp(min=1.0)
        if beta1 is not None:
            u = through_moment(of, "exp_avg", u, group, scale=size, momentum=beta1, dampening=beta1, nesterov=False)
            size = 1.0
        step_along(of, u, group, size=size, decay=lr * group["weight_decay"])


def scaled(grad: Tensor, state: dict[str, Any], c: float, least: float, whole: Tensor) -> Tensor:
    """g / sqrt(max(V, least^2)), with the new V of the state; g, which is float32 or wider, is overwritten by it.

    Of a DTensor `whole` all but it are this rank's rows; the columns of a matrix are those of all ranks' rows.
    """
    if grad.dim() < 2:
        variance = state["variance"]
        variance.lerp_(grad * grad, c)
        denominator = variance.clone()
    else:
        rows, columns, count = state["row_var"], state["col_var"], whole.shape[-2]
        squares = [torch.linalg.vector_norm(grad, dim=dim, keepdim=True).square_() for dim in (-1, -2)]
        rows.lerp_(squares[0].div_(grad.shape[-1]), c)
        total, of_columns = rows.sum(-2, keepdim=True), squares[1]
        if grad.dim() == 2:  # otherwise whole matrices are divided
            sums = sum_over_ranks(torch.cat((total, of_columns), dim=1), whole)
            total, of_columns = sums.split((1, sums.shape[1] - 1), dim=1)
        columns.lerp_(of_columns / count, c)
        denominator = rows @ columns
        denominator.div_((total / count).clamp_(min=least))
    return grad.mul_(denominator.clamp_(min=least * least).rsqrt_())


def rms(local: Tensor, whole: Tensor) -> Tensor:
    """The root of the mean square of a tensor of which `local` is this rank's part, 0-dim float32."""
    square = sum_over_ranks(square_sum([local]), whole)
    return (square / max(1, whole.numel())).sqrt().float()
