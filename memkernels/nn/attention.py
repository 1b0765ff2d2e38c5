"""Self-attention layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memkernels import ops
from memkernels.nn.linears import weights_of
from memkernels.nn.norm import RMSNorm
from memkernels.ops.attention.checks import check_score_options
from memkernels.ops.checks import check_flag, check_integer, check_parameter_dtype


class Attention(torch.nn.Module):
    """`ops.attention_block` with learnable weights, under the state_dict keys of Hugging Face's attention layers.

    y = o_proj(`ops.attention`(q, k, v)) of q, k and v = q_proj(x), k_proj(x) and v_proj(x) in heads, those of q and k
    normed and rotated where that is asked for. Weights: q_proj (H D, d), k_proj (Hk D, d), v_proj (Hk Dv, d), o_proj
    (d, H Dv), H and Hk the numbers of heads. A projection may be an `nn.LoRALinear`, or quantised.

    Args:
        hidden_size: d, of input and output.
        num_heads: of queries.
        num_kv_heads: of keys and values; those of queries by default.
        head_size: D; hidden_size // num_heads by default.
        v_head_size: Dv; D by default.
        bias: a bias in the projections of q, k and v (Qwen2).
        out_bias: a bias in the output projection.
        head_norm: an RMS norm of each query and key (Qwen3).
        sinks: one more learnable logit a head (gpt-oss).
        causal, window, softcap, scale, dropout_p: as in `ops.attention`; dropout in training mode only.
        interleaved: as in `ops.apply_rotary`.
        dtype: of the parameters: x's, unless autocast casts both; sinks are made, and read, in float32.

    Raises:
        TypeError: a size, a number of heads, scale, softcap, dropout_p or a bound of the window that is no number; a
            bias, out_bias, head_norm, sinks, causal or interleaved that is no bool; a dtype that the op does not take.
        ValueError: one of them, or a window, that does not fit; numbers of heads that do not divide.

    Saved for backward, beside the parameters, cos and sin: x itself, d elements a token, out, H Dv elements, and 4 H
    bytes; with dropout its seed.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        head_size: int | None = None,
        v_head_size: int | None = None,
        bias: bool = False,
        out_bias: bool = False,
        head_norm: bool = False,
        sinks: bool = False,
        causal: bool = True,
        window: tuple[int, int] = (-1, -1),
        softcap: float | None = 0.0,
        scale: float | None = None,
        dropout_p: float = 0.0,
        interleaved: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_integer("hidden_size", hidden_size)
        check_integer("num_heads", num_heads)
        check_integer("num_kv_heads", num_kv_heads)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads {num_heads}, got {num_kv_heads}.")
        if head_size is None and hidden_size % num_heads:
            raise ValueError(f"num_heads: expected a divisor of hidden_size {hidden_size}, got {num_heads}.")
        head_size = hidden_size // num_heads if head_size is None else head_size
        v_head_size = head_size if v_head_size is None else v_head_size
        check_integer("head_size", head_size)
        check_integer("v_head_size", v_head_size)
        flags = {"bias": bias, "out_bias": out_bias, "head_norm": head_norm, "sinks": sinks, "interleaved": interleaved}
        for name, flag in flags.items():
            check_flag(name, flag)
        check_score_options(causal, scale, window, 0.0 if softcap is None else softcap, dropout_p)
        check_parameter_dtype(dtype)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = torch.nn.Linear(hidden_size, num_heads * head_size, bias=bias, **options)
        self.k_proj = torch.nn.Linear(hidden_size, num_kv_heads * head_size, bias=bias, **options)
        self.v_proj = torch.nn.Linear(hidden_size, num_kv_heads * v_head_size, bias=bias, **options)
        self.o_proj = torch.nn.Linear(num_heads * v_head_size, hidden_size, bias=out_bias, **options)
        self.q_norm = RMSNorm(head_size, **options) if head_norm else None
        self.k_norm = RMSNorm(head_size, **options) if head_norm else None
        self.sinks = torch.nn.Parameter(torch.zeros(num_heads, device=device)) if sinks else None
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.dropout_p = dropout_p
        self.options = {
            "causal": causal, "window": window, "softcap": softcap, "scale": scale, "interleaved": interleaved,
        }  # fmt: skip

    def arguments(self) -> dict[str, Any]:
        """What `ops.attention_block` and `ops.decoder_layer` take of this layer."""
        sinks: Tensor | None = self.sinks
        if sinks is not None:  # a cast of the layer casts them too
            sinks = sinks.to(torch.promote_types(sinks.dtype, torch.float32))
        return weights_of(self, "qkvo") | self.options | {
            "num_heads": self.num_heads,
            "q_norm_weight": None if self.q_norm is None else self.q_norm.weight,
            "k_norm_weight": None if self.k_norm is None else self.k_norm.weight,
            "sinks": sinks,
            "dropout_p": self.dropout_p if self.training else 0.0,
        }  # fmt: skip

    def forward(self, x: Tensor, cos: Tensor | None = None, sin: Tensor | None = None, **options: Any) -> Tensor:
        """y, like x (B, S, d); `options` are further ones of `ops.attention_block`: the norm in front, cu_seqlens.

        cos and sin: (S, R), (1, S, R) or (B, S, R), as `nn.RotaryEmbedding` gives them; None: no rotation.

        Raises:
            TypeError, ValueError: as `ops.attention_block`: a dtype, shape, device or option that does not fit.
        """
        return ops.attention_block(x, **self.arguments() | options, cos=cos, sin=sin)

    def extra_repr(self) -> str:
        shown = {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads, "dropout_p": self.dropout_p}
        return ", ".join(f"{name}={value}" for name, value in (shown | self.options).items())
