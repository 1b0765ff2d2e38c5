"""SGD with momentum of 4, 2, 1 or half a byte a parameter."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from memkernels.ops.checks import check_flag
from memkernels.optim.checks import check_in_range
from memkernels.optim.optimizer import LowMemoryOptimizer, Moment


class SGD(LowMemoryOptimizer):
    """Stochastic gradient descent as `torch.optim.SGD` has it, one native call for all parameters of a group:

        g = g + weight_decay p        b = momentum b + (1 - dampening) g, and g at the first step
        p = p - lr b, with Nesterov's momentum p - lr (g + momentum b), without momentum p - lr g

    computed in float32. b takes 4, 2, 1 + 4 / 256 or 1/2 + 4 / 128 bytes a parameter at 32, 16, 8 or 4 state_bits,
    stored as `AdamW` stores its first moment; nothing without momentum. With 32 bits and float32 parameters it gives
    what `torch.optim.SGD` does, to rounding, and each loads the other's checkpoints. `params`, `maximize`,
    `state_bits`, `rounding` and `seed`, the step's arguments and what is raised are those of `AdamW`.

    Args:
        lr: a number, or a tensor of one.
        momentum: of b.
        dampening: of what a gradient adds to b.
        weight_decay: added to the gradient, times p.
        nesterov: needs momentum, and no dampening.
    """

    operator = "sgd"
    saves_step = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        state_bits: int = 32,
        rounding: str = "stochastic",
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
            "nesterov": nesterov, "maximize": maximize, "state_bits": state_bits, "rounding": rounding, "seed": seed,
        }  # fmt: skip
        super().__init__(params, defaults)

    def moments(self, group: dict[str, Any]) -> tuple[Moment, ...]:
        return (Moment("momentum_buffer", signed=True),) if group["momentum"] else ()

    def _check_options(self, group: dict[str, Any]) -> None:
        check_in_range("lr", group["lr"], 0.0)
        check_in_range("momentum", group["momentum"], 0.0)
        check_in_range("dampening", group["dampening"], 0.0, 1.0)
        check_in_range("weight_decay", group["weight_decay"], 0.0)
        check_flag("nesterov", group["nesterov"])
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ValueError("nesterov: expected momentum above 0, and dampening of 0.")

    def _numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        return {key: group[key] for key in ("lr", "momentum", "dampening", "weight_decay", "nesterov")}
