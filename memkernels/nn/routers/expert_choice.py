"""The router by which experts choose tokens."""

from __future__ import annotations

import math

from torch import Tensor

from memkernels.nn.routers.router import ROUNDING, Router, Routing, check_capacity_factor, largest
from memkernels.ops.moe.plan import expert_choice_plan


class ExpertChoiceRouter(Router):
    """Each expert takes the tokens that score highest with it. Zhou et al. 2022, arXiv 2202.09368.

    S = softmax(logits) over the experts; expert e takes the capacity tokens of the highest S[:, e], of equal ones the
    earlier, with weight S[t, e]. capacity = capacity_factor T / E (section 3.1: the factor is the experts a token has
    on average), rounded down, at least 1 and at most T. Balanced by construction: the load balance loss is zero. A
    token's experts depend on later tokens, so this is no router for a causal language model.

    Args:
        hidden_size: d.
        num_experts: E.
        capacity_factor: experts a token has on average.
        jitter: as `Router`.

    Raises:
        TypeError, ValueError: as `Router`; a capacity factor that is no positive, finite number.

    A token has as many choices as experts took it, capacity E in all: plan and weights grow with those and with T.

    Saved for backward: as `Router`.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, *, capacity_factor: float = 2.0, jitter: float = 0.0, device=None,
        dtype=None,
    ):  # fmt: skip
        super().__init__(hidden_size, num_experts, jitter=jitter, device=device, dtype=dtype)
        check_capacity_factor("capacity_factor", capacity_factor, "a positive number")
        self.capacity_factor = capacity_factor

    def capacity(self, tokens: int) -> int:
        """The tokens an expert takes of this many."""
        return min(tokens, max(1, math.floor(self.capacity_factor * tokens / self.num_experts * (1 + ROUNDING))))

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Routing:
        """Of x (T, d); padding_mask (T,), bool, is True where a token is padding: no expert takes it.

        `expert_ids` and `expert_weights` of the result are (P,), P = E capacity, those of one token behind those of the
        one before, as `plan.token_offsets` says.

        Raises:
            TypeError, ValueError: a shape or dtype other than those.
            RuntimeError: logits that are not finite; on a GPU a device-side assertion.
        """
        logits = self.logits(x, padding_mask)
        scores = logits.softmax(1)
        order = scores.detach() if padding_mask is None else scores.detach().masked_fill(padding_mask[:, None], -1.0)
        tokens = x.shape[0]
        # In the order of tokens; none, numbered T, in the place of padding.
        taken = largest(order.t(), self.capacity(tokens)).sort(1).values
        if padding_mask is not None:
            taken = taken.masked_fill(padding_mask[taken], tokens)
        plan, choice = expert_choice_plan(taken, tokens)
        token, expert = taken.flatten()[choice], choice.div(max(1, taken.shape[1]), rounding_mode="floor")
        weights = scores.flatten().gather(0, token.clamp(max=tokens - 1) * self.num_experts + expert)
        if padding_mask is not None:
            expert = expert.masked_fill(token == tokens, self.num_experts)
        return self.planned(plan, logits, expert, weights, logits.new_zeros(()), padding_mask)
