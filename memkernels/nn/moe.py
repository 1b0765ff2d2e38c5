"""Mixture-of-experts layers."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from memkernels import ops
from memkernels.nn.adapted_experts import ExpertsLoRA
from memkernels.nn.expert_mesh import (
    check_mesh,
    check_settings,
    draw_experts,
    held,
    sharded,
    take_shards,
)
from memkernels.nn.routers import Router, Routing, SwitchRouter
from memkernels.nn.routers.router import check_padding_mask
from memkernels.ops.checks import check_flag, check_floating, check_integer, check_number, check_parameter_dtype
from memkernels.ops.gated_activation.op import check_activation
from memkernels.ops.moe.exchange import failing_together
from memkernels.ops.moe.parallel import start_moe_mlp


class MoE(torch.nn.Module):
    """A router and its experts, `ops.moe_mlp`, with or without a layer that every token goes through.

    y[t] = sum over t's experts e of weight[t, e] f_e(x[t]) + shared(x[t]). Parameters of the experts have the names and
    layout of transformers', gate_up_proj (E, 2 n, d), or (E, n, d) ungated, and down_proj (E, d, n); frozen ones of
    `memkernels.quant` may take their place, with `expert_mesh` each rank's of its own experts. `adapt` freezes them and
    trains adapters of theirs.

    Args:
        router: which experts a token goes to.
        hidden_size: d.
        expert_size: n, of an expert's hidden layer.
        activation: silu, gelu, gelu_tanh, relu or relu_squared.
        gated: False: f_e(x) = act(x gate_up_proj[e]^T) down_proj[e]^T.
        shared: a layer (..., d) to (..., d), `nn.GatedMLP` for one: the shared experts of DeepSeek and Qwen2-MoE.
        expert_dropout: `dropout_p` of `ops.moe_mlp` in training.
        recompute: as `ops.moe_mlp`.
        expert_mesh: a `torch.distributed.device_mesh.DeviceMesh` of one dimension: its ranks hold the experts in equal
            parts, and tokens travel to them and back, beside the work of other experts and of `shared`.

    With `expert_mesh` (expert parallelism; GShard, arXiv 2006.16668) each rank calls the layer with tokens of its own,
    as many as it has, none for one, and all ranks call it and its backward pass alike. The router and `shared` are the
    same on every rank, by one seed or by DistributedDataParallel, and see the rank's own tokens, of which capacity,
    losses and `Routing` are. Results and gradients are those of one process that has all tokens. The experts'
    gradients are of the sum of the ranks' losses: where those of other parameters are averaged over the ranks, the
    loss of the experts' is as many times as large.

    The experts and their adapters are DTensors, sharded by the first dimension, under the same keys.
    `torch.distributed.checkpoint` saves and loads them, and their optimizer states, over any number of ranks;
    `get_model_state_dict` with `full_state_dict=True` returns what one process has, and `load_state_dict` takes that on
    any number of ranks, each its part. For one seed parameters are the same on any number of ranks.

    In an optimizer and in `torch.nn.utils.get_total_norm` DTensors are a group of their own (foreach kernels take no
    mixture), and DistributedDataParallel is to leave them, by `_set_params_and_buffers_to_ignore_for_model`.

    Saved for backward: as `ops.moe_mlp`. With `expert_mesh`, where `recompute` is off, also the rows that the rank
    received: d elements for each; with it x is sent again in backward, together with the gradient of y.

    Raises:
        TypeError: router is no `Router`, shared no module, a size no integer, gated or recompute no bool,
            expert_dropout no number, dtype not floating, or expert_mesh no DeviceMesh.
        ValueError: a size that is not positive; a hidden_size other than router's; an unknown activation, or
            expert_dropout outside [0, 1); an expert_mesh of several dimensions; ranks differ in their arguments, on
            every rank; num_experts is not a multiple of the ranks.
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
        expert_dropout: float = 0.0,
        recompute: bool = True,
        expert_mesh=None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if not isinstance(router, Router):
            raise TypeError(f"router: expected a Router, got {type(router).__name__}.")
        experts = router.num_experts
        if expert_mesh is not None:
            settings = {
                "router": type(router).__name__, "num_experts": experts, "hidden_size": hidden_size,
                "expert_size": expert_size, "activation": activation, "gated": gated, "recompute": recompute,
                "expert_dropout": expert_dropout, "dtype": str(dtype or torch.get_default_dtype()),
            }  # fmt: skip
            check_mesh(expert_mesh, experts, settings)
            experts //= expert_mesh.size()
        for name, size in (("hidden_size", hidden_size), ("expert_size", expert_size)):
            check_integer(name, size)
        for name, flag in (("gated", gated), ("recompute", recompute)):
            check_flag(name, flag)
        check_parameter_dtype(dtype)
        if shared is not None and not isinstance(shared, torch.nn.Module):
            raise TypeError(f"shared: expected a module or None, got {type(shared).__name__}.")
        if hidden_size != router.weight.shape[1]:
            raise ValueError(f"hidden_size: expected {router.weight.shape[1]}, that of router, got {hidden_size}.")
        check_activation(activation)
        check_number("expert_dropout", expert_dropout, "a number in [0, 1)", lambda number: 0 <= number < 1)
        self.router = router
        self.expert_mesh = expert_mesh
        width = 2 * expert_size if gated else expert_size
        self.gate_up_proj = self._experts_weight(experts, width, hidden_size, device, dtype)
        self.down_proj = self._experts_weight(experts, hidden_size, expert_size, device, dtype)
        self.shared = shared
        self.adapters = torch.nn.ModuleDict()
        self.activation = activation
        self.expert_dropout = expert_dropout
        self.recompute = recompute
        self.reset_parameters()

    def _experts_weight(self, experts: int, out: int, size: int, device, dtype) -> torch.nn.Parameter:
        local = torch.empty(experts, out, size, device=device, dtype=dtype)
        return torch.nn.Parameter(sharded(local, self.expert_mesh))

    def reset_parameters(self) -> None:
        """Truncated normal of variance 0.1 / fan-in (Switch Transformers, section 2.4), each expert by its own seed."""
        for weight in (self.gate_up_proj, self.down_proj):
            std = math.sqrt(0.1 / weight.shape[2])
            draw = partial(torch.nn.init.trunc_normal_, std=std, a=-2 * std, b=2 * std)
            draw_experts(weight, self.expert_mesh, draw)

    def adapt(self, r: int = 16, **options: Any) -> None:
        """Freezes the experts and puts an `ExpertsLoRA` of rank r on both of their weights; options: as it has them.

        Raises:
            ValueError: they have one already; r is out of its range; ranks of `expert_mesh` differ in their arguments.
        """
        if len(self.adapters):
            raise ValueError("MoE: the experts have an adapter already.")
        if self.expert_mesh is not None:
            check_settings(self.expert_mesh, {"r": r, **options})
        mesh, weights = self.expert_mesh, {name: getattr(self, name) for name in ("gate_up_proj", "down_proj")}
        made = {name: ExpertsLoRA(held(of, mesh), r, expert_mesh=mesh, **options) for name, of in weights.items()}
        for weight in weights.values():
            weight.requires_grad_(False)
        self.adapters.update(made)

    def _weights(self) -> tuple[Any, Any]:
        """gate_up_proj and down_proj of the experts that this rank holds, as `ops.moe_mlp` takes them."""
        adapters: Any = self.adapters

        def weight(name: str) -> Any:
            own = held(getattr(self, name), self.expert_mesh)
            return adapters[name].adapted(own) if name in adapters else own

        return weight("gate_up_proj"), weight("down_proj")

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Routing]:
        """y, like x (..., d), and the `Routing`, which holds the losses and reports what was dropped.

        padding_mask (...,), bool, is True where a token is padding: its y is that of `shared` alone, else zero.

        Checkpoint it with use_reentrant=False. With True torch follows no tensor within a nested result: y has its
        gradients, and the losses, in `Routing`, have none.

        Raises:
            TypeError, ValueError: as the router and `ops.moe_mlp`: a dtype, shape or device that does not fit.
            RuntimeError: the router's logits are not finite; with `expert_mesh`, on the other ranks where one rank's
                router, arguments, experts or `shared` raise.
        """
        options: dict[str, Any] = {
            "activation": self.activation, "dropout_p": self.expert_dropout if self.training else 0.0,
            "recompute": self.recompute,
        }  # fmt: skip
        if self.expert_mesh is None:
            rows, routing = self._route(x, padding_mask)
            y = ops.moe_mlp(rows, routing.plan, routing.expert_weights, *self._weights(), **options).view(x.shape)
            return y if self.shared is None else y + self.shared(x), routing
        group = self.expert_mesh.get_group()
        with failing_together(group, self.router.num_experts, self.down_proj.device):
            weights, (rows, routing) = self._weights(), self._route(x, padding_mask)
        pending = start_moe_mlp(rows, routing.plan, routing.expert_weights, *weights, group, **options)
        shared = None if self.shared is None else pending.beside(self.shared, x)
        y = pending.finish().view(x.shape)
        return y if shared is None else y + shared, routing

    def _route(self, x: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Routing]:
        """The tokens (T, d) and where they go."""
        check_floating("x", x)
        hidden_size = self.down_proj.shape[1]
        if x.dim() == 0 or x.shape[-1] != hidden_size:
            raise ValueError(f"x: expected shape (..., {hidden_size}), got {tuple(x.shape)}.")
        check_padding_mask(padding_mask, x.shape[:-1])
        rows = x.reshape(-1, hidden_size)
        return rows, self.router(rows, None if padding_mask is None else padding_mask.reshape(-1))

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        take_shards(self, ("gate_up_proj", "down_proj"), self.expert_mesh, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, expert_dropout={self.expert_dropout}, recompute={self.recompute}"


class SwitchFFN(MoE):
    """The feed-forward layer of Switch Transformers: `SwitchRouter` and ungated experts. arXiv 2101.03961.

    Args:
        hidden_size: d.
        expert_size: n, of an expert's hidden layer; gate_up_proj is (E, n, d), down_proj (E, d, n).
        num_experts: E.
        activation: that of the experts; the paper's is relu.
        capacity_factor, eval_capacity_factor, jitter: as `SwitchRouter`.
        expert_dropout: as `MoE`; the paper fine-tunes with 0.4, and 0.1 elsewhere (section 2.4).
        recompute: as `ops.moe_mlp`.
        expert_mesh: as `MoE`.

    Raises:
        TypeError, ValueError: as `MoE` and `SwitchRouter`.

    Saved for backward: as `MoE`.
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
        expert_dropout: float = 0.0,
        recompute: bool = True,
        expert_mesh=None,
        device=None,
        dtype=None,
    ):
        router = SwitchRouter(
            hidden_size, num_experts, capacity_factor=capacity_factor, eval_capacity_factor=eval_capacity_factor,
            jitter=jitter, device=device, dtype=dtype,
        )  # fmt: skip
        super().__init__(
            router, hidden_size, expert_size, activation, gated=False, expert_dropout=expert_dropout,
            recompute=recompute, expert_mesh=expert_mesh, device=device, dtype=dtype,
        )  # fmt: skip
