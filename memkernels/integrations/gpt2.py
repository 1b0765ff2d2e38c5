"""GPT-2: layer norms, learned positions, one projection for q, k and v, weights transposed, an ungated MLP."""

from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.models.gpt2 import modeling_gpt2 as gpt2

from memkernels.integrations.family import Family


def _eager_attention(attention, query, key, value, attention_mask, **kwargs):
    if attention.reorder_and_upcast_attn:
        return attention._upcast_and_reordered_attn(query, key, value, attention_mask)
    return gpt2.eager_attention_forward(attention, query, key, value, attention_mask, **kwargs)


FAMILY = Family(
    norm=nn.LayerNorm,
    attention=gpt2.GPT2Attention,
    mlp=gpt2.GPT2MLP,
    decoder_layer=gpt2.GPT2Block,
    model=gpt2.GPT2Model,
    causal_lm=gpt2.GPT2LMHeadModel,
    eager_attention=_eager_attention,
    outputs=CausalLMOutputWithCrossAttentions,
    norms=("ln_1", None, "ln_2", None),
    inner_dropouts=("resid_dropout", "dropout"),
    layers="h",
    embeddings="wte",
    self_attention="attn",
    attention_dropout="attn_dropout",
    qkv=("c_attn",),
    o="c_proj",
    gate_up=(None, "c_fc"),
    down="c_proj",
    activation="act",
)
