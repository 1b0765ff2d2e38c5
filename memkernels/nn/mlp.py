"""Feed-forward layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memkernels import ops
from memkernels.nn.linears import weights_of
from memkernels.ops.checks import check_flag, check_integer, check_parameter_dtype, check_tile_tokens
from memkernels.ops.gated_activation.op import check_activation


class GatedMLP(torch.nn.Module):
    """`ops.gated_mlp` with learnable weights, under the state_dict keys of Hugging Face's LlamaMLP.

    y = (act(gate_proj(x)) * up_proj(x)) through down_proj: gate_proj and up_proj have weights (f, d), down_proj (d, f).
    A projection may be an `nn.LoRALinear`, or quantised.

    Args:
        hidden_size: d, of input and output.
        intermediate_size: f.
        activation: silu, gelu, gelu_tanh, relu or relu_squared.
        bias: a bias in each projection.
        gated: False: y = act(up_proj(x)) through down_proj, without gate_proj.
        tile_tokens: tokens that are computed at a time; None: as `ops.gated_mlp` chooses.
        dtype: of the parameters: x's, unless autocast casts both.

    Raises:
        TypeError: a size or a tile_tokens that is no integer; a bias or gated that is no bool; a dtype that the op does
            not take.
        ValueError: an unknown activation, or a size or a tile_tokens that is not positive.

    Saved for backward, beside the parameters: x itself, d elements a token, with a norm in front or without, and r
    elements of an adapter of down_proj.
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
        check_integer("hidden_size", hidden_size)
        check_integer("intermediate_size", intermediate_size)
        check_activation(activation)
        check_flag("bias", bias)
        check_flag("gated", gated)
        check_tile_tokens(tile_tokens)
        check_parameter_dtype(dtype)
        options = {"bias": bias, "device": device, "dtype": dtype}
        self.gate_proj = torch.nn.Linear(hidden_size, intermediate_size, **options) if gated else None
        self.up_proj = torch.nn.Linear(hidden_size, intermediate_size, **options)
        self.down_proj = torch.nn.Linear(intermediate_size, hidden_size, **options)
        self.activation = activation
        self.tile_tokens = tile_tokens

    def arguments(self) -> dict[str, Any]:
        """What `ops.gated_mlp` and `ops.decoder_layer` take of this layer."""
        weights = weights_of(self, ("gate", "up", "down"))
        return weights | {"activation": self.activation, "tile_tokens": self.tile_tokens}

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        """y, like x (..., d); `options` are further ones of `ops.gated_mlp`: the norm in front.

        Raises:
            TypeError, ValueError: as `ops.gated_mlp`: a dtype, shape, device or option that does not fit.
        """
        return ops.gated_mlp(x, **self.arguments() | options)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, tile_tokens={self.tile_tokens}"
