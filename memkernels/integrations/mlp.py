"""Gated MLPs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from memkernels import ops
from memkernels.integrations.plain import has_hooks, is_plain_linear
from memkernels.integrations.replacement import Replacement, bind

_ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu_squared",
}


def plan_mlp(mlp: nn.Module, recompute: bool) -> Replacement:
    activation = activation_of(mlp)
    if activation is None:
        return Replacement("MLP", left=f"memkernels has no activation {type(mlp.act_fn).__name__}")
    return Replacement("MLP", bind(mlp_forward, mlp, activation=activation, recompute=recompute))


def activation_of(mlp: nn.Module) -> str | None:
    """The name in memkernels of an MLP's activation; None where there is none."""
    return _ACTIVATIONS.get(type(getattr(mlp, "act_fn", None)).__name__)


def mlp_forward(mlp: Any, x: Tensor, *, activation: str, recompute: bool) -> Tensor:
    """The projections as modules, whatever they are, and `ops.gated_activation`; plain ones are recomputed if asked."""
    if recompute and is_plain_mlp(mlp):
        return ops.gated_mlp(x, **mlp_arguments(mlp, activation))
    return mlp.down_proj(ops.gated_activation(mlp.gate_proj(x), mlp.up_proj(x), activation))


def is_plain_mlp(mlp: Any) -> bool:
    """Whether an op may take the projections' tensors."""
    projections = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return not has_hooks(mlp.act_fn) and all(is_plain_linear(projection) for projection in projections)


def mlp_arguments(mlp: Any, activation: str) -> dict[str, Any]:
    """What `ops.gated_mlp` takes of an MLP of plain projections."""
    gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    return {
        "w_gate": gate.weight, "w_up": up.weight, "w_down": down.weight,
        "b_gate": gate.bias, "b_up": up.bias, "b_down": down.bias, "activation": activation,
    }  # fmt: skip
