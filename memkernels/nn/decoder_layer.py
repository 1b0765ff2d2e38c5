"""A pre-norm decoder layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memkernels import ops
from memkernels.nn.attention import Attention
from memkernels.nn.mlp import GatedMLP
from memkernels.nn.norm import RMSNorm
from memkernels.ops.checks import check_eps


class DecoderLayer(torch.nn.Module):
    """`ops.decoder_layer` with learnable weights, under the state_dict keys of Hugging Face's LlamaDecoderLayer.

    h = x + attention(input_layernorm(x)), y = h + mlp(post_attention_layernorm(h)), both norms RMS, of weights (d,) in
    the device and dtype of attention's.

    Args:
        attention: of which the norm in front is `input_layernorm`.
        mlp: of which the norm in front is `post_attention_layernorm`.
        norm_eps: of both norms.

    Raises:
        TypeError: an attention that is no `nn.Attention`, an mlp that is no `nn.GatedMLP`, or a norm_eps that is no
            number.
        ValueError: a norm_eps that is negative or infinite.

    Saved for backward, beside the parameters, cos and sin: what attention saves, x, out and 4 bytes a head; of the
    feed-forward layer nothing but the r elements of an adapter of down_proj.
    """

    def __init__(self, attention: Attention, mlp: GatedMLP, norm_eps: float = 1e-6):
        super().__init__()
        for name, layer, kind in (("attention", attention, Attention), ("mlp", mlp, GatedMLP)):
            if not isinstance(layer, kind):
                raise TypeError(f"{name}: expected an nn.{kind.__name__}, got {type(layer).__name__}.")
        check_eps("norm_eps", norm_eps)
        like = attention.q_proj.weight
        options: dict[str, Any] = {"eps": norm_eps, "device": like.device, "dtype": like.dtype}
        self.self_attn = attention
        self.mlp = mlp
        self.input_layernorm = RMSNorm(like.shape[1], **options)
        self.post_attention_layernorm = RMSNorm(like.shape[1], **options)

    def forward(self, x: Tensor, cos: Tensor | None = None, sin: Tensor | None = None, **options: Any) -> Tensor:
        """y, like x (B, S, d); cos, sin and `options` as in `nn.Attention`, such as cu_seqlens.

        Raises:
            TypeError, ValueError: as `ops.decoder_layer`: a dtype, shape, device or option that does not fit.
        """
        attention = self.self_attn.arguments() | options | {"cos": cos, "sin": sin} | _in_front(self.input_layernorm)
        mlp = self.mlp.arguments() | _in_front(self.post_attention_layernorm)
        return ops.decoder_layer(x, attention, mlp)


def _in_front(norm: RMSNorm) -> dict[str, Any]:
    return {"norm_weight": norm.weight, "norm_eps": norm.eps, "norm_offset": norm.weight_offset}
