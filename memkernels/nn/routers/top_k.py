"""Routers to each token's k best experts: Mixtral's, Qwen's, OLMoE's, DeepSeek-V3's."""

from __future__ import annotations

import torch
from torch import Tensor

from memkernels.nn.routers.router import Router, Routing, largest
from memkernels.ops.checks import check_finite, check_flag, check_integer

SCORES = ("softmax", "softmax_of_top_k", "sigmoid")


class TopKRouter(Router):
    """Each token goes to the k experts of its highest scores. Dropless.

    scores = softmax(logits) or sigmoid(logits); the k experts of the highest scores + score_bias are chosen, of equal
    ones the lower; weight = scaling * score, with `normalize` over the sum of the k chosen (DeepSeek-V3, arXiv
    2412.19437, equations 13 to 15, adds 1e-20 to the sum). "softmax_of_top_k" takes the softmax of the k highest logits
    alone, which is "softmax" normalised (Mixtral, arXiv 2401.04088). The load balance loss is E sum over experts of
    f_e P_e, with f_e the choices of expert e over tokens (they sum to k) and P_e its mean score, scores of a token
    normalised to sum to 1 (Switch Transformers' loss for k choices, as Mixtral, Qwen-MoE and OLMoE have it in
    transformers); k where balanced.

    Args:
        hidden_size: d.
        num_experts: E.
        k: experts a token.
        scores: softmax, softmax_of_top_k or sigmoid.
        normalize: weights of a token sum to `scaling`.
        scaling: factor of the weights.
        num_groups: experts are in so many equal groups, neighbours in one.
        top_groups: a token's experts come from so many groups, those whose two best experts have the highest sum of
            scores + score_bias (DeepSeek-V3, section 2.1.2).
        score_bias: a buffer (E,) that steers the choice but not the weights (Wang et al. 2024, arXiv 2408.15664):
            `update_bias` after each step balances the load without a loss. It is float32 whatever the module is cast to
            or loads, since a narrower one swallows the steps.
        jitter: as `Router`.

    Raises:
        TypeError, ValueError: as `Router`; unknown scores; groups that do not divide the experts; k or top_groups out
            of range; a scaling that is not finite; normalize or score_bias is no bool.

    Saved for backward: as `Router`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        k: int,
        *,
        scores: str = "softmax",
        normalize: bool = False,
        scaling: float = 1.0,
        num_groups: int = 1,
        top_groups: int = 1,
        score_bias: bool = False,
        jitter: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__(hidden_size, num_experts, jitter=jitter, device=device, dtype=dtype)
        if scores not in SCORES:
            raise ValueError(f"scores: expected one of {', '.join(SCORES)}, got {scores!r}.")
        for name, value in (("k", k), ("num_groups", num_groups), ("top_groups", top_groups)):
            check_integer(name, value)
        for name, flag in (("normalize", normalize), ("score_bias", score_bias)):
            check_flag(name, flag)
        check_finite("scaling", scaling)
        if num_experts % num_groups:
            raise ValueError(f"num_groups: expected a divisor of num_experts = {num_experts}, got {num_groups}.")
        if top_groups > num_groups:
            raise ValueError(f"top_groups: expected 1 to num_groups = {num_groups}, got {top_groups}.")
        within = num_experts // num_groups * top_groups
        if k > within:
            raise ValueError(f"k: expected 1 to {within}, the experts to choose from, got {k}.")
        self.k = k
        self.scores = scores
        self.normalize = normalize
        self.scaling = scaling
        self.num_groups = num_groups
        self.top_groups = top_groups
        self.score_bias: Tensor | None
        bias = torch.zeros(num_experts, dtype=torch.float32, device=device) if score_bias else None
        self.register_buffer("score_bias", bias)

    def _apply(self, fn, recurse=True):
        before = self.score_bias
        super()._apply(fn, recurse)
        after = self.score_bias
        if before is not None and after is not None and after.dtype != torch.float32:
            self.score_bias = before.to(after.device)
        return self

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        if self.score_bias is not None:
            self.score_bias = self.score_bias.float()

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Routing:
        """Of x (T, d); padding_mask (T,), bool, is True where a token is padding: it goes nowhere, counts in no loss.

        Raises:
            TypeError, ValueError: a shape or dtype other than those.
            RuntimeError: logits that are not finite; on a GPU a device-side assertion.
        """
        logits = self.logits(x, padding_mask)
        scores = logits.sigmoid() if self.scores == "sigmoid" else logits.softmax(1)
        ids = largest(self._choice_scores(scores.detach()), self.k)
        weights = logits.gather(1, ids).softmax(1) if self.scores == "softmax_of_top_k" else scores.gather(1, ids)
        if self.normalize:
            weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
        shares = scores / (scores.sum(1, keepdim=True) + 1e-20) if self.scores == "sigmoid" else scores
        return self.routing(logits, ids, weights * self.scaling, shares, padding_mask, None)

    def _choice_scores(self, scores: Tensor) -> Tensor:
        """What experts are chosen by: -inf outside the chosen groups."""
        if self.score_bias is not None:
            scores = scores + self.score_bias
        if self.top_groups == self.num_groups:
            return scores
        grouped = scores.unflatten(1, (self.num_groups, -1))
        of_group = grouped.topk(min(2, grouped.shape[2]), dim=2).values.sum(2)
        kept = torch.zeros_like(of_group, dtype=torch.bool).scatter_(1, largest(of_group, self.top_groups), True)
        return grouped.masked_fill(~kept[:, :, None], -torch.inf).flatten(1)

    @torch.no_grad()
    def update_bias(self, counts: Tensor, rate: float = 1e-3) -> None:
        """score_bias += rate sign(mean load - load), after a step.

        Args:
            counts: (E,), choices of each expert: `routing.plan.counts[:E]`, summed over ranks where there are several.
            rate: u in arXiv 2408.15664.

        Raises:
            TypeError: counts is no tensor, or rate no number.
            ValueError: the router has no score_bias; a shape other than that; rate is not finite.
        """
        if self.score_bias is None:
            raise ValueError("score_bias: this router has none; make it with score_bias=True.")
        check_finite("rate", rate)
        if not isinstance(counts, Tensor):
            raise TypeError(f"counts: expected a tensor, got {type(counts).__name__}.")
        if tuple(counts.shape) != (self.num_experts,):
            raise ValueError(f"counts: expected shape ({self.num_experts},), got {tuple(counts.shape)}.")
        load = counts.float()
        self.score_bias.add_(rate * torch.sign(load.mean() - load))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, k={self.k}, scores={self.scores!r}, normalize={self.normalize}"
