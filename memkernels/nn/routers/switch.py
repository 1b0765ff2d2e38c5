"""The router of Switch Transformers."""

from __future__ import annotations

import math

from torch import Tensor

from memkernels.nn.routers.router import ROUNDING, Router, Routing, check_capacity_factor


class SwitchRouter(Router):
    """Each token goes to the expert of its highest probability, weighted by it. Fedus et al. 2021, arXiv 2101.03961.

    p = softmax(logits), e = argmax p, weight = p[e]. An expert takes ceil(capacity_factor T / E) tokens, in their
    order (equation 3, T the tokens of the call, padding included, so that shapes do not depend on data). The load
    balance loss is E sum over experts of f_e P_e (equations 4 to 6 without the coefficient, 1e-2 in the paper), f_e the
    fraction of the tokens whose argmax is e, dropped ones included, P_e their mean p[e]; 1 where balanced.

    Args:
        hidden_size: d.
        num_experts: E.
        capacity_factor: in training; None: dropless.
        eval_capacity_factor: in evaluation; None: dropless.
        jitter: as `Router`; the paper's is 1e-2.

    Raises:
        TypeError, ValueError: as `Router`; a capacity factor that is no positive, finite number.

    Saved for backward: as `Router`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        capacity_factor: float | None = 1.25,
        eval_capacity_factor: float | None = 2.0,
        jitter: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__(hidden_size, num_experts, jitter=jitter, device=device, dtype=dtype)
        for name, factor in (("capacity_factor", capacity_factor), ("eval_capacity_factor", eval_capacity_factor)):
            if factor is not None:
                check_capacity_factor(name, factor, "a positive number or None")
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor

    def capacity(self, tokens: int) -> int | None:
        """The most tokens an expert takes of this many."""
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        return None if factor is None else max(1, math.ceil(factor * tokens / self.num_experts * (1 - ROUNDING)))

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Routing:
        """Of x (T, d); padding_mask (T,), bool, is True where a token is padding: it goes nowhere, counts in no loss.

        Raises:
            TypeError, ValueError: a shape or dtype other than those.
            RuntimeError: logits that are not finite; on a GPU a device-side assertion.
        """
        logits = self.logits(x, padding_mask)
        probabilities = logits.softmax(1)
        ids = probabilities.argmax(1, keepdim=True)  # of equal ones the first
        weights = probabilities.gather(1, ids)
        return self.routing(logits, ids, weights, probabilities, padding_mask, self.capacity(x.shape[0]))
