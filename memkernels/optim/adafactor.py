"""Adafactor: a second moment of a matrix as a row and a column."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from memkernels._library import has_kernel
from memkernels.optim.checks import check_in_range
from memkernels.optim.clipping import as_number
from memkernels.optim.directed import DirectedOptimizer, Stored, step_along, step_arguments, through_moment
from memkernels.optim.operators import factored_square_sum, factored_squares, square_sum, step_group
from memkernels.optim.optimizer import Moment
from memkernels.optim.rows import sum_over_ranks

_LEAST_LR = 1e-30  # which the length of a step is divided by, to be multiplied by it again


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
    nothing without beta1. A step reads the gradient three times, makes nothing of a parameter's size, and on a GPU
    waits for no number; without the native library it takes three tensors of that size in float32. Of DTensors, as
    FSDP2 makes them, each rank has rows of R, V and m, and all of C.
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
        check_in_range("lr", group["lr"], 0.0)
        check_in_range("beta2_decay", group["beta2_decay"], -math.inf, 0.0)
        if not isinstance(group["eps"], (tuple, list)) or len(group["eps"]) != 2:
            raise ValueError(f"eps: expected two numbers, the first may be None, got {group['eps']!r}.")
        for value in group["eps"][group["eps"][0] is None :]:
            check_in_range("eps", value, 0.0)
        check_in_range("d", group["d"], 1.0)
        check_in_range("weight_decay", group["weight_decay"], 0.0)
        if group["beta1"] is not None:
            check_in_range("beta1", group["beta1"], 0.0, 1.0, below=True)

    def _numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        return {}

    def _step_along(self, several: Sequence[Stored], group: dict[str, Any]) -> None:
        for of in several:
            self._step_one(of, group)

    def _step_one(self, of: Stored, group: dict[str, Any]) -> None:
        lr, (least, least_rms) = as_number(group["lr"]), group["eps"]
        least = torch.finfo(of.param.dtype).eps if least is None else least
        native = has_kernel("adafactor_", of.param)
        grad, scale = (of.grad, of.scale) if native else (of.grad.float() * of.scale, 1.0)
        rows, columns = factors(grad, scale, of, of.step ** group["beta2_decay"], least)
        most = 1 / least if least else math.inf
        if native:
            square = factored_square_sum(grad, rows, columns, most, scale)
        else:
            square = square_sum([grad.mul_((rows * columns).clamp_(max=most))])
        alpha = rms(square_sum([of.param]), of.whole).clamp(min=least_rms) * _smaller(lr, of.step**-0.5)
        size = alpha / (rms(square, of.whole) / group["d"]).clamp(min=1.0)
        if native:
            moments = () if group["beta1"] is None else ("exp_avg",)
            numbers = {
                "lr": lr, "beta1": float(group["beta1"] or 0.0), "weight_decay": float(group["weight_decay"]),
                "rows": rows, "columns": columns, "most": most,
            }  # fmt: skip
            step_group("adafactor", [], step_arguments(of, grad, group, moments, size * scale), numbers)
            return
        if group["beta1"] is not None:
            grad = through_moment(
                of, "exp_avg", grad, group, scale=size, momentum=group["beta1"], dampening=group["beta1"],
                nesterov=False,
            )  # fmt: skip
            size = torch.ones_like(size)
        lr = lr.clamp(min=_LEAST_LR) if isinstance(lr, Tensor) else max(lr, _LEAST_LR)
        step_along(of, grad, group, lr=lr, size=size / lr)


def factors(grad: Tensor, scale: float | Tensor, of: Stored, c: float, least: float) -> tuple[Tensor, Tensor]:
    """What the rows of (scale g) are multiplied by, and what its columns, for those of g / sqrt(V), with the new V of
    the state; of a vector 1, and what its elements are. What is larger than 1 / least counts as that.

    Of a DTensor all are this rank's rows; the columns of a matrix are those of all ranks' rows.
    """
    if grad.dim() < 2:
        variance = of.state["variance"]
        _, squares = factored_squares(grad.view(1, 1, -1), scale)
        variance.lerp_(squares.view(variance.shape), c)
        return variance.new_ones(()), variance.rsqrt()
    rows, columns, count = of.state["row_var"], of.state["col_var"], of.whole.shape[-2]
    of_rows, of_columns = factored_squares(grad.view(math.prod(grad.shape[:-2]), *grad.shape[-2:]), scale)
    rows.lerp_(of_rows.view(rows.shape).div_(grad.shape[-1]), c)
    total, of_columns = rows.sum(-2, keepdim=True), of_columns.view(columns.shape)
    if grad.dim() == 2:  # otherwise whole matrices are divided
        sums = sum_over_ranks(torch.cat((total, of_columns), dim=1), of.whole)
        total, of_columns = sums.split((1, sums.shape[1] - 1), dim=1)
    columns.lerp_(of_columns / count, c)
    return (rows / (total / count).clamp_(min=least)).rsqrt_(), columns.rsqrt()


def rms(square: Tensor, whole: Tensor) -> Tensor:
    """The root of the mean square of a tensor by the sum of the squares of this rank's part, 0-dim float32."""
    return (sum_over_ranks(square, whole) / max(1, whole.numel())).sqrt().float()


def _smaller(lr: float | Tensor, other: float) -> float | Tensor:
    return lr.clamp(max=other) if isinstance(lr, Tensor) else min(lr, other)
