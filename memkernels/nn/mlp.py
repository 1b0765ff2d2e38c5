"""Feed-forward layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memkernels import ops
from memkernels.ops.gated_activation.op import check_activation


class GatedMLP(torch.nn.Module):
    """`ops.gated_mlp` with learnable weights, under the state_dict keys of Hugging Face's LlamaMLP.

    Args:
        hidden_size: d, of input and output.
        intermediate_size: f.
        activation: silu, gelu, gelu_tanh, relu or relu_squared.
        bias: a bias in each projection.
        gated: False: y = act(up_proj(x)) through down_proj, without gate_proj.
        tile_tokens: tokens that are computed at a time; None: as `ops.gated_mlp` chooses.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: str = "silu",
        *,
        bias: bool = False,
        gated: bool = True,
        tile_tokens: int | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_activation(activation)
        options = {"bias": bias, "device": device, "dtype": dtype}
        self.gate_proj = torch.nn.Linear(hidden_size, intermediate_size, **options) if gated else None
        self.up_proj = torch.nn.Linear(hidden_size, intermediate_size, **options)
        self.down_proj = torch.nn.Linear(intermediate_size, hidden_size, **options)
        self.activation = activation
        self.tile_tokens = tile_tokens

    def arguments(self) -> dict[str, Any]:
        """What `ops.gated_mlp` and `ops.decoder_layer` take of this layer."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        return {
            "w_gate": None if gate is None else gate.weight, "w_up": up.weight, "w_down": down.weight,
            "b_gate": None if gate is None else gate.bias, "b_up": up.bias, "b_down": down.bias,
            "activation": self.activation, "tile_tokens": self.tile_tokens,
        }  # fmt: skip

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        """y, like x (..., d); `options` are further ones of `ops.gated_mlp`: the norm in front."""
        return ops.gated_mlp(x, **self.arguments() | options)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, tile_tokens={self.tile_tokens}"
