"""Mixture-of-experts layers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memkernels import ops
from memkernels.nn.routers import Router, Routing, SwitchRouter
from memkernels.ops.gated_activation.op import check_activation


class MoE(torch.nn.Module):
    """A router and its experts, `ops.moe_mlp`, with or without a layer that every token goes through.

    y[t] = sum over t's experts e of weight[t, e] f_e(x[t]) + shared(x[t]). Parameters of the experts have the names and
    layout of transformers' (`gate_up_proj`, `down_proj`).

    Args:
        router: which experts a token goes to.
        hidden_size: d.
        expert_size: n, of an expert's hidden layer.
        activation: silu, gelu, gelu_tanh, relu or relu_squared.
        gated: False: f_e(x) = act(x gate_up_proj[e]^T) down_proj[e]^T.
        shared: a layer (..., d) to (..., d), `nn.GatedMLP` for one: the shared experts of DeepSeek and Qwen2-MoE.
        recompute: as `ops.moe_mlp`.
    """

    def __init__(
        self,
        router: Router,
        hidden_size: int,
        expert_size: int,
        activation: str = "silu",
        *,
        gated: bool = True,
        shared: torch.nn.Module | None = None,
        recompute: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_activation(activation)
        experts, width = router.num_experts, 2 * expert_size if gated else expert_size
        self.router = router
        self.gate_up_proj = torch.nn.Parameter(torch.empty(experts, width, hidden_size, device=device, dtype=dtype))
        self.down_proj = torch.nn.Parameter(torch.empty(experts, hidden_size, expert_size, device=device, dtype=dtype))
        self.shared = shared
        self.activation = activation
        self.recompute = recompute
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal of variance 0.1 / fan-in (Switch Transformers, section 2.4)."""
        for weight in (self.gate_up_proj, self.down_proj):
            std = math.sqrt(0.1 / weight.shape[2])
            torch.nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Routing]:
        """y, like x (..., d), and the `Routing`, which holds the losses and reports what was dropped.

        padding_mask (...,), bool, is True where a token is padding: its y is that of `shared` alone, else zero.
        """
        rows = x.reshape(-1, x.shape[-1])
        routing = self.router(rows, None if padding_mask is None else padding_mask.reshape(-1))
        y = ops.moe_mlp(
            rows, routing.plan, routing.expert_weights, self.gate_up_proj, self.down_proj, activation=self.activation,
            recompute=self.recompute,
        ).view(x.shape)  # fmt: skip
        return y if self.shared is None else y + self.shared(x), routing

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, recompute={self.recompute}"


class SwitchFFN(MoE):
    """The feed-forward layer of Switch Transformers: `SwitchRouter` and ungated experts. arXiv 2101.03961.

    Args:
        hidden_size: d.
        expert_size: n.
        num_experts: E.
        activation: that of the experts; the paper's is relu.
        capacity_factor, eval_capacity_factor, jitter: as `SwitchRouter`.
        recompute: as `ops.moe_mlp`.
    """

    def __init__(
        self,
        hidden_size: int,
        expert_size: int,
        num_experts: int,
        activation: str = "relu",
        *,
        capacity_factor: float | None = 1.25,
        eval_capacity_factor: float | None = 2.0,
        jitter: float = 1e-2,
        recompute: bool = True,
        device=None,
        dtype=None,
    ):
        router = SwitchRouter(
            hidden_size, num_experts, capacity_factor=capacity_factor, eval_capacity_factor=eval_capacity_factor,
            jitter=jitter, device=device, dtype=dtype,
        )  # fmt: skip
        super().__init__(
            router, hidden_size, expert_size, activation, gated=False, recompute=recompute, device=device, dtype=dtype
        )
