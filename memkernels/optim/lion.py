"""Lion with a state of 4, 2, 1 or half a byte a parameter."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from memkernels.optim.checks import check_betas, check_in_range
from memkernels.optim.optimizer import LowMemoryOptimizer, Moment


class Lion(LowMemoryOptimizer):
    """Lion (Chen et al. 2023, arXiv 2302.06675), one native call for all parameters of a group:

        p = p (1 - lr weight_decay) - lr sign(beta1 m + (1 - beta1) g)        m = beta2 m + (1 - beta2) g

    computed in float32. m takes 4, 2, 1 + 4 / 256 or 1/2 + 4 / 128 bytes a parameter at 32, 16, 8 or 4 state_bits,
    stored as `AdamW` stores its first moment; `params`, `maximize`, `state_bits`, `rounding` and `seed`, the step's
    arguments and what is raised are those of `AdamW`.

    Args:
        lr: a number, or a tensor of one. The paper takes a third to a tenth of AdamW's.
        betas: of the update's direction, and of m.
        weight_decay: decoupled, times lr; the paper takes three to ten times AdamW's.
    """

    operator = "lion"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        state_bits: int = 32,
        rounding: str = "stochastic",
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize,
            "state_bits": state_bits, "rounding": rounding, "seed": seed,
        }  # fmt: skip
        super().__init__(params, defaults)

    def moments(self, group: dict[str, Any]) -> tuple[Moment, ...]:
        return (Moment("exp_avg", signed=True),)

    def _check_options(self, group: dict[str, Any]) -> None:
        check_in_range("lr", group["lr"], 0.0)
        check_betas(group["betas"])
        check_in_range("weight_decay", group["weight_decay"], 0.0)

    def _numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        return {"lr": group["lr"], "beta1": beta1, "beta2": beta2, "weight_decay": group["weight_decay"]}
