"""What every router does: logits in float32, jitter, padding, and its two losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memkernels.ops.checks import check_floating, check_integer, check_number, check_parameter_dtype
from memkernels.ops.moe.plan import DispatchPlan, moe_plan
from memkernels.ops.philox import seed_tensor
from memkernels.ops.router_logits.op import router_logits

# Relative: more than what factor * tokens / num_experts is off by, whose factor is a decimal number or a quotient.
ROUNDING = 2.0**-50


class Routing(NamedTuple):
    """Where the tokens of one call go.

    Args:
        plan: the dispatch; `plan.dropped` and `plan.counts` report what each expert got.
        expert_ids: (T, k), int64, or (P,) where the plan has `token_offsets`; num_experts means nowhere, where padding
            goes.
        expert_weights: likewise, float32, with gradient to the router.
        load_balance_loss: a scalar, as the router defines it, not yet scaled by a coefficient.
        z_loss: the mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, equation 5), not yet scaled.
        logits: (T, E), float32; zero of padding.
    """

    plan: DispatchPlan
    expert_ids: Tensor
    expert_weights: Tensor
    load_balance_loss: Tensor
    z_loss: Tensor
    logits: Tensor


class Router(torch.nn.Module):
    """The base of the routers: logits = x' weight^T in float32, whatever x's dtype, autocast off.

    x' is x, in training times noise uniform in [1 - jitter, 1 + jitter] (Switch Transformers, section 2.4).

    Args:
        hidden_size: d.
        num_experts: E; weight is (E, d).
        jitter: the noise's half width; 0: none.

    Raises:
        TypeError: hidden_size or num_experts is no integer, jitter no number, or dtype not floating.
        ValueError: hidden_size is not positive, no expert, or a jitter outside [0, 1).

    Saved for backward: x as it is, where weight has a gradient, the seed of the noise, and, by autograd, a few tensors
    (T, E) and (T, k).
    """

    def __init__(self, hidden_size: int, num_experts: int, *, jitter: float = 0.0, device=None, dtype=None):
        super().__init__()
        check_integer("hidden_size", hidden_size)
        check_integer("num_experts", num_experts, "at least 1")
        check_number("jitter", jitter, "at least 0 and less than 1", lambda number: 0 <= number < 1)
        check_parameter_dtype(dtype)
        self.num_experts = num_experts
        self.jitter = jitter
        self.weight = torch.nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal of variance 0.1 / d (Switch Transformers, section 2.4)."""
        std = math.sqrt(0.1 / self.weight.shape[1])
        torch.nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)

    def logits(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """(T, E), float32, of x (T, d); zero, and without a gradient, where padding_mask (T,), bool, is True.

        Raises:
            TypeError: x is not of a floating dtype, or padding_mask no tensor.
            ValueError: another shape; a padding_mask that is not so.
            RuntimeError: a token's logits are not finite, padding aside; on a GPU a device-side assertion.
        """
        check_floating("x", x)
        if x.dim() != 2 or x.shape[1] != self.weight.shape[1]:
            raise ValueError(f"x: expected shape (T, {self.weight.shape[1]}), got {tuple(x.shape)}.")
        check_padding_mask(padding_mask, x.shape[:1])
        seed = seed_tensor(None, x.device) if self.training and self.jitter > 0 else None
        logits = router_logits(x, self.weight, jitter=self.jitter, seed=seed, padding_mask=padding_mask)
        torch._assert_async(
            logits.isfinite().all(),
            "logits: expected finite numbers, got NaN or an infinity: x or the weight of the router holds one.",
        )
        return logits

    def routing(
        self,
        logits: Tensor,
        expert_ids: Tensor,
        expert_weights: Tensor,
        shares: Tensor,
        padding_mask: Tensor | None,
        capacity: int | None,
    ) -> Routing:
        """Of tokens that chose experts; shares (T, E) are what the load balance loss takes the mean P_e of."""
        expert_ids = hide(expert_ids, padding_mask, self.num_experts)
        plan = moe_plan(expert_ids, self.num_experts, capacity=capacity)
        chosen = plan.counts[:-1].float() / visible_tokens(logits, padding_mask)
        balance = self.num_experts * torch.dot(chosen, mean_over_tokens(shares, padding_mask))
        return self.planned(plan, logits, expert_ids, expert_weights, balance, padding_mask)

    def planned(
        self,
        plan: DispatchPlan,
        logits: Tensor,
        expert_ids: Tensor,
        expert_weights: Tensor,
        load_balance_loss: Tensor,
        padding_mask: Tensor | None,
    ) -> Routing:
        """Of a plan that there is."""
        z_loss = mean_over_tokens(logits.logsumexp(1).square(), padding_mask)
        return Routing(plan, expert_ids, expert_weights, load_balance_loss, z_loss, logits)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, num_experts={self.num_experts}, jitter={self.jitter}"


def check_padding_mask(padding_mask: Tensor | None, shape: Sequence[int]) -> None:
    """bool of the tokens' shape: True where a token is padding."""
    if padding_mask is None:
        return
    if not isinstance(padding_mask, Tensor):
        raise TypeError(f"padding_mask: expected a tensor or None, got {type(padding_mask).__name__}.")
    if padding_mask.dtype != torch.bool or tuple(padding_mask.shape) != tuple(shape):
        raise ValueError(
            f"padding_mask: expected bool of shape {tuple(shape)}, True where a token is padding, got"
            f" {padding_mask.dtype} of shape {tuple(padding_mask.shape)}."
        )


def check_capacity_factor(name: str, factor: float, expected: str) -> None:
    check_number(name, factor, expected, lambda number: 0 < number < math.inf)


def hide(expert_ids: Tensor, padding_mask: Tensor | None, num_experts: int) -> Tensor:
    """Padding goes nowhere."""
    return expert_ids if padding_mask is None else expert_ids.masked_fill(padding_mask[:, None], num_experts)


def visible_tokens(values: Tensor, padding_mask: Tensor | None) -> int | Tensor:
    """How many of the first dimension are no padding; 1 where there is none."""
    return max(values.shape[0], 1) if padding_mask is None else (~padding_mask).sum().clamp(min=1)


def mean_over_tokens(values: Tensor, padding_mask: Tensor | None) -> Tensor:
    """The mean over the first dimension, padding left out; zero where there is no token."""
    if padding_mask is not None:
        values = torch.where(padding_mask.view(-1, *(1,) * (values.dim() - 1)), 0.0, values)
    return values.sum(0) / visible_tokens(values, padding_mask)


def largest(scores: Tensor, k: int) -> Tensor:
    """The indices (T, k) of each row's k largest scores, float32, largest first; of equal ones the lower comes first.

    `torch.topk` leaves the order of equal scores open, which differs between devices and releases. What it compares
    here is never equal: a score's bits, as an integer of the scores' order, and behind them the index, descending.
    """
    bits = (scores + 0.0).view(torch.int32)  # of zeros of both signs +0
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    descending = torch.arange(scores.shape[1] - 1, -1, -1, device=scores.device)
    return ((ordered << 32) + descending).topk(k, dim=1).indices
