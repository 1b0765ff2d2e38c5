"""gpt-oss: sinks in attention, a sliding window in every other layer, experts instead of an MLP."""

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss

from memkernels.integrations.family import Family, own_window
from memkernels.integrations.masks import begins_of


def _packed_masks(model: Any, position_ids: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """(B, 1, S, S): causal within a sequence."""
    sequence = begins_of(position_ids).cumsum(-1)
    tokens = torch.arange(position_ids.shape[1], device=position_ids.device)
    distance = tokens[:, None] - tokens
    hidden = (sequence[:, :, None] != sequence[:, None]) | (distance < 0)
    by_type = {"full_attention": hidden, "sliding_attention": hidden | (distance >= model.config.sliding_window)}
    least = torch.finfo(dtype).min
    return {of: mask[:, None].to(dtype).masked_fill(mask[:, None], least) for of, mask in by_type.items()}


FAMILY = Family(
    norm=gpt_oss.GptOssRMSNorm,
    attention=gpt_oss.GptOssAttention,
    mlp=None,
    decoder_layer=gpt_oss.GptOssDecoderLayer,
    model=gpt_oss.GptOssModel,
    causal_lm=gpt_oss.GptOssForCausalLM,
    eager_attention=gpt_oss.eager_attention_forward,
    outputs=MoeCausalLMOutputWithPast,
    experts=gpt_oss.GptOssExperts,
    experts_left="their gate is clamped, and they have biases",
    half_tables=True,
    sliding_window=own_window,
    packed_masks=_packed_masks,
)
