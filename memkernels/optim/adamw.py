"""AdamW with states of 8, 4, 2 or 1 bytes a parameter."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from memkernels.optim.checks import check_betas, check_in_range
from memkernels.optim.optimizer import LowMemoryOptimizer, Moment


class AdamW(LowMemoryOptimizer):
    """AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101), one native call for all parameters of a group:

        m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
        p = p (1 - lr weight_decay) - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

    computed in float32. With 32 bits and float32 parameters it gives what `torch.optim.AdamW` does, to rounding, and
    each loads the other's checkpoints. There is no `foreach` or `fused`: every step goes over all parameters at once,
    threads share the elements of all of them, and a parameter's result does not depend on which others are there.

    Bytes of state a parameter, beside the parameter itself:

    | state_bits | m and v | bytes |
    | --- | --- | --- |
    | 32 | float32 | 8 |
    | 16 | bfloat16, rounded stochastically | 4 |
    | 8 | dynamic codes by blocks of 256 (Dettmers et al. 2021, arXiv 2110.02861) | 2 + 8 / 256 |
    | 4 | by blocks of 128: m dynamic codes, v sixteenths of absmax (Li et al. 2023, arXiv 2309.01507) | 1 + 8 / 128 |

    `memkernels.optim.codes` has the code books. A block begins at a multiple of its size, counted over the elements of
    the whole parameter in order, so that how a parameter is cut at such multiples changes no state. A gradient that is
    not finite makes the moments of its block NaN.

    bfloat16 parameters need more bits than they have, since most updates are below their last one:

    - rounding="stochastic" rounds each updated value up or down at random, so that the mean is right. The random bits
      are Philox at the seed, the step, the parameter's place in the optimizer and the element's index, of a DTensor
      divided by rows that in the whole parameter.
    - rounding="remainder" keeps the 16 bits that bfloat16 lacks as a state (int16, 2 bytes a parameter): together they
      are an exact float32 master weight. The parameter is that weight to nearest (of two as near the larger magnitude).
      What else writes into the parameter moves the master weight with it, to within one unit in bfloat16's last place.

    Args:
        params: parameters or groups of them, as for `torch.optim.AdamW`: float32 or bfloat16, also both in one group,
            dense, on one device, of any strides (of those that are not contiguous a copy is made for the step). Each of
            the arguments below can be set for a group. DTensors too, as FSDP2 and tensor parallelism make them: each
            rank steps its part, in 8 or 4 bits whole blocks of the parameter (parts that begin at multiples of 256
            elements), and clipping is by the norm of all ranks. Codes and absmax are plain tensors of a rank's part,
            which torch's Distributed Checkpoint takes for the same on every rank: `ShardedOptimizer` with stage=3 on
            the same model, and `save_checkpoint`, save them.
        lr: a number, or a tensor of one, which is read at each step, on a GPU by the kernels alone. Schedulers work as
            with torch's optimizers.
        betas: of m and v.
        eps: added to the denominator.
        weight_decay: decoupled, times lr.
        maximize: follow the gradient up.
        state_bits: 32, 16, 8 or 4.
        rounding: "stochastic" or "remainder", of bfloat16 parameters.
        seed: of the random bits.

    Raises:
        TypeError: a parameter is complex, sparse, of another dtype, a tensor subclass but DTensor, or partial sums.
        ValueError: a value is out of its range, parameters are on several devices, or ranks' parts of a DTensor begin
            within blocks.
    """

    operator = "adamw"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        state_bits: int = 32,
        rounding: str = "stochastic",
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize,
            "state_bits": state_bits, "rounding": rounding, "seed": seed,
        }  # fmt: skip
        super().__init__(params, defaults)

    def moments(self, group: dict[str, Any]) -> tuple[Moment, ...]:
        return (Moment("exp_avg", signed=True), Moment("exp_avg_sq", signed=False))

    def _check_options(self, group: dict[str, Any]) -> None:
        check_in_range("lr", group["lr"], 0.0)
        check_betas(group["betas"])
        check_in_range("eps", group["eps"], 0.0)
        check_in_range("weight_decay", group["weight_decay"], 0.0)

    def _numbers(self, group: dict[str, Any]) -> dict[str, float]:
        beta1, beta2 = group["betas"]
        return {
            "lr": group["lr"], "beta1": beta1, "beta2": beta2, "eps": group["eps"],
            "weight_decay": group["weight_decay"],
        }  # fmt: skip
