"""MLPs, gated and ungated."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from memkernels import ops
from memkernels.integrations.family import Family, VisionTower
from memkernels.integrations.linears import is_linear
from memkernels.integrations.plain import has_hooks
from memkernels.integrations.projections import projected, weights
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


def plan_mlp(mlp: nn.Module, family: Family | VisionTower, recompute: bool) -> Replacement:
    activation = activation_of(mlp, family)
    if activation is None:
        return Replacement("MLP", left=f"memkernels has no activation {type(_activation(mlp, family)).__name__}")
    dropout = family.inner_dropouts[1] if isinstance(family, Family) else None
    options = {"activation": activation, "recompute": recompute, "dropout": dropout}
    forward = bind(mlp_forward, mlp, family=family, **options)
    return Replacement("MLP", forward)


def activation_of(mlp: nn.Module, family: Family | VisionTower) -> str | None:
    """The name in memkernels of an MLP's activation; None where there is none."""
    return activation_name(_activation(mlp, family))


def activation_name(activation: nn.Module | None) -> str | None:
    """The name in memkernels of an activation module; None where there is none."""
    return _ACTIVATIONS.get(type(activation).__name__)


def mlp_forward(
    mlp: Any, x: Tensor, *, family: Family | VisionTower, activation: str, recompute: bool, dropout: str | None
) -> Tensor:
    """The projections as modules, whatever they are, and `ops.gated_activation`; recomputed if asked and linear."""
    if has_hooks(_activation(mlp, family)):
        return type(mlp).forward(mlp, x)
    if recompute and is_linear_mlp(mlp, family, x):
        y = ops.gated_mlp(x, **mlp_arguments(mlp, x, family, activation))
    else:
        gate, up = projected(mlp, family.gate_up, x, _sizes(mlp, family))
        gate, up = (up, None) if gate is None else (gate, up)
        y = getattr(mlp, family.down)(ops.gated_activation(gate, up, activation))
    return y if dropout is None else getattr(mlp, dropout)(y)


def fits_block(mlp: Any, family: Family | VisionTower, x: Tensor | None = None) -> bool:
    """Whether an op may compute the MLP in a call with x."""
    return (
        type(mlp) is family.mlp
        and activation_of(mlp, family) is not None
        and not has_hooks(mlp)
        and is_linear_mlp(mlp, family, x)
    )


def is_linear_mlp(mlp: Any, family: Family | VisionTower, x: Tensor | None) -> bool:
    """Whether an op may take the projections' tensors in a call with x."""
    gate_up = [getattr(mlp, name) for name in family.gate_up if name is not None]
    in_parts = len(family.gate_up) == 1
    return (
        not has_hooks(_activation(mlp, family))
        and all(is_linear(projection, x, in_parts=in_parts) for projection in gate_up)
        and is_linear(getattr(mlp, family.down), x)
    )


def mlp_arguments(mlp: Any, x: Tensor, family: Family | VisionTower, activation: str) -> dict[str, Any]:
    """What `ops.gated_mlp` takes of an MLP of linear projections."""
    arguments = weights(mlp, x, family.gate_up, ("gate", "up"), _sizes(mlp, family))
    return arguments | weights(mlp, x, (family.down,), ("down",), ()) | {"activation": activation}


def _activation(mlp: Any, family: Family | VisionTower) -> Any:
    return getattr(mlp, family.activation, None)


def _sizes(mlp: Any, family: Family | VisionTower) -> tuple[int, ...]:
    """Of gate and up where they are one projection."""
    return (mlp.config.intermediate_size,) * 2 if len(family.gate_up) == 1 else ()
