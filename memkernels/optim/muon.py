"""Muon: momentum made orthogonal, for matrices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from memkernels._library import has_kernel
from memkernels.ops.checks import check_flag
from memkernels.optim.checks import check_in_range
from memkernels.optim.clipping import as_number
from memkernels.optim.directed import DirectedOptimizer, Stored, moment_arguments, step_along, through_moment
from memkernels.optim.local import is_distributed
from memkernels.optim.operators import muon_momentum
from memkernels.optim.optimizer import Moment
from memkernels.optim.rows import through_whole, waves

# The dtype of products; elsewhere bfloat16. Processors without products of bfloat16 take longer for them.
_PRODUCTS = {"cpu": torch.float32}
ADJUSTMENTS = (None, "original", "match_rms_adamw")


class Muon(DirectedOptimizer):
    """Muon (Jordan 2024, kellerjordan.github.io/posts/muon) as `torch.optim.Muon` has it, for matrices (M, N):

        b = momentum b + (1 - momentum) g        u = (1 - momentum) g + momentum b with Nesterov's momentum, else b
        p = p (1 - lr weight_decay) - lr r O(u)

    O(u) is u / max(|u|, eps) after `ns_steps` of X = a X + (b X X^T + c (X X^T)^2) X, of u^T where M > N: close to the
    nearest matrix with orthonormal rows or columns. r is sqrt(max(1, M / N)), with adjust_lr_fn="match_rms_adamw"
    0.2 sqrt(max(M, N)) (Liu et al. 2025, arXiv 2502.16982). torch documents b = momentum b + g and computes b as here;
    O is the same of both.

    b takes 4, 2, 1 + 4 / 256 or 1/2 + 4 / 128 bytes a parameter at 32, 16, 8 or 4 state_bits, stored as `AdamW` stores
    its first moment. The products are in bfloat16 on GPUs, as torch's are, and in float32 on CPU. A step takes four
    matrices of a parameter's size, one parameter at a time. Of DTensors, as FSDP2 makes them, each rank has rows of b;
    u comes together on one rank, each rank having another matrix at a time, and O(u) goes back by rows, for which a
    rank has u of all of its rows too. States that are offloaded are in memory for as many matrices as ranks at a time.
    Embeddings, heads, norms and biases are for `AdamW`::

        matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
        others = [p for p in model.parameters() if all(p is not of for of in matrices)]
        optimizers = memkernels.optim.Muon(matrices, lr=0.02), memkernels.optim.AdamW(others, lr=3e-4)

    It loads checkpoints of `torch.optim.Muon`, and torch's loads its own with 32 bits. `params`, `maximize`,
    `state_bits`, `rounding` and `seed`, the step's arguments and what is raised are those of `AdamW`.

    Args:
        lr: a number, or a tensor of one.
        weight_decay: decoupled, times lr.
        momentum: of b.
        nesterov: whether u looks ahead.
        ns_coefficients: a, b and c.
        eps: the least norm that u is divided by.
        ns_steps: of the iteration, below 100.
        adjust_lr_fn: None or "original", or "match_rms_adamw".

    Raises:
        ValueError: a parameter that is no matrix.
    """

    operator = "sgd"
    saves_step = False
    not_in_torch = ("maximize",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        maximize: bool = False,
        state_bits: int = 32,
        rounding: str = "stochastic",
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov,
            "ns_coefficients": ns_coefficients, "eps": eps, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn,
            "maximize": maximize, "state_bits": state_bits, "rounding": rounding, "seed": seed,
        }  # fmt: skip
        super().__init__(params, defaults)

    def moments(self, group: dict[str, Any]) -> tuple[Moment, ...]:
        return (Moment("momentum_buffer", signed=True),)

    def _check_options(self, group: dict[str, Any]) -> None:
        for name in ("lr", "weight_decay", "momentum", "eps"):
            check_in_range(name, group[name], 0.0)
        check_flag("nesterov", group["nesterov"])
        coefficients, steps = group["ns_coefficients"], group["ns_steps"]
        if not isinstance(coefficients, (tuple, list)) or len(coefficients) != 3:
            raise ValueError(f"ns_coefficients: expected three numbers, got {coefficients!r}.")
        for coefficient in coefficients:
            check_in_range("ns_coefficients", coefficient, -math.inf)
        if isinstance(steps, bool) or not isinstance(steps, int) or not 0 <= steps < 100:
            raise ValueError(f"ns_steps: expected an integer from 0 to 99, got {steps!r}.")
        if group["adjust_lr_fn"] not in ADJUSTMENTS:
            raise ValueError(f"adjust_lr_fn: expected one of {ADJUSTMENTS}, got {group['adjust_lr_fn']!r}.")
        for index, param in enumerate(group["params"]):
            if isinstance(param, Tensor) and param.dim() != 2:
                raise ValueError(
                    f"params[{index}]: expected a matrix, got shape {tuple(param.shape)}; AdamW is for others."
                )

    def _numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        return {}

    def _together(self, chosen: dict[int, Tensor]) -> Iterator[dict[int, Tensor]]:
        """Of matrices whose rows are divided those that the ranks orthogonalise at the same time."""
        divided = sorted(
            ((place, param) for place, param in chosen.items() if is_distributed(param)),
            key=lambda of: _largest_first(*of),
        )
        yield from super()._together({place: param for place, param in chosen.items() if not is_distributed(param)})
        for wave in waves([param for _, param in divided]):
            yield dict(divided[wave])

    def _step_along(self, several: Sequence[Stored], group: dict[str, Any]) -> None:
        def direction_of(u: Tensor) -> Tensor:
            return orthogonal(u, group["ns_coefficients"], group["ns_steps"], group["eps"])

        if not is_distributed(several[0].whole):
            (of,) = several
            self._along(of, direction_of(self._ahead(of, group)), group)
            return
        several = sorted(several, key=lambda of: _largest_first(of.place, of.whole))
        ahead = [self._ahead(of, group) for of in several]
        for of, rows in zip(several, through_whole(direction_of, ahead, [of.whole for of in several]), strict=True):
            self._along(of, rows, group)

    def _ahead(self, of: Stored, group: dict[str, Any]) -> Tensor:
        """u, in the dtype of the products."""
        momentum, nesterov = float(group["momentum"]), group["nesterov"]
        scale, dtype = of.scale * (1 - momentum), _PRODUCTS.get(of.grad.device.type, torch.bfloat16)
        if dtype == torch.bfloat16 and has_kernel("muon_momentum_", of.grad):
            arguments = moment_arguments(of, "momentum_buffer", of.grad, group, scale)
            return muon_momentum(arguments, momentum, nesterov)
        u = through_moment(
            of, "momentum_buffer", of.grad, group, scale=scale, momentum=momentum, dampening=0.0, nesterov=nesterov
        )
        return u.to(dtype)

    def _along(self, of: Stored, direction: Tensor, group: dict[str, Any]) -> None:
        size = adjustment(group["adjust_lr_fn"], of.whole.shape)
        step_along(of, direction, group, lr=as_number(group["lr"]), size=size)


def _largest_first(place: int, matrix: Tensor) -> tuple[int, int]:
    """Those that ranks have at the same time are about as large."""
    return -matrix.numel(), place


def orthogonal(u: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """O(u), in u's dtype."""
    a, b, c = coefficients
    x = u / u.norm().clamp(min=eps)
    is_tall = u.shape[0] > u.shape[1]
    for _ in range(steps):
        gram = x.t() @ x if is_tall else x @ x.t()
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, x, polynomial, beta=a) if is_tall else torch.addmm(x, polynomial, x, beta=a)
    return x


def adjustment(rule: str | None, shape: torch.Size) -> float:
    """r."""
    rows, columns = shape
    if rule == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / max(columns, 1)))
