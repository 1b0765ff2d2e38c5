"""GPT-2's MLP: two Conv1Ds and an activation between, then dropout."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from memkernels import ops
from memkernels.integrations.linears import is_linear
from memkernels.integrations.mlp import activation_name
from memkernels.integrations.plain import has_hooks
from memkernels.integrations.projections import weights
from memkernels.integrations.replacement import Replacement, bind


def plan_mlp(mlp: Any, recompute: bool) -> Replacement:
    activation = activation_name(mlp.act)
    if activation is None:
        return Replacement("MLP", left=f"memkernels has no activation {type(mlp.act).__name__}")
    return Replacement("MLP", bind(mlp_forward, mlp, activation=activation, recompute=recompute))


def mlp_forward(mlp: Any, hidden_states: Tensor, *, activation: str, recompute: bool) -> Tensor:
    """The projections as modules and `ops.gated_activation`, ungated; recomputed if asked and linear."""
    if recompute and is_linear_mlp(mlp):
        return mlp.dropout(ops.gated_mlp(hidden_states, **mlp_arguments(mlp, activation)))
    return mlp.dropout(mlp.c_proj(ops.gated_activation(mlp.c_fc(hidden_states), None, activation)))


def fits_block(mlp: Any) -> bool:
    """Whether an op may compute the MLP but its dropout, and the norm in front."""
    return type(mlp) is GPT2MLP and not has_hooks(mlp) and is_linear_mlp(mlp)


def is_linear_mlp(mlp: Any) -> bool:
    """Whether an op may take the projections' tensors."""
    return not has_hooks(mlp.act) and all(is_linear(projection) for projection in (mlp.c_fc, mlp.c_proj))


def mlp_arguments(mlp: Any, activation: str) -> dict[str, Any]:
    """What `ops.gated_mlp` takes of an MLP of linear projections."""
    arguments = weights(mlp, ("c_fc",), ("up",), ()) | weights(mlp, ("c_proj",), ("down",), ())
    return arguments | {"w_gate": None, "activation": activation}
