"""Gemma 3: an RMS norm over each head of q and k, and a sliding window in most layers."""

from transformers.models.gemma3 import modeling_gemma3 as gemma3

from memkernels.integrations import gemma
from memkernels.integrations.family import Family, own_window

FAMILY = Family(
    norm=gemma3.Gemma3RMSNorm,
    attention=gemma3.Gemma3Attention,
    mlp=gemma3.Gemma3MLP,
    decoder_layer=gemma3.Gemma3DecoderLayer,
    model=gemma3.Gemma3TextModel,
    causal_lm=gemma3.Gemma3ForCausalLM,
    eager_attention=gemma3.eager_attention_forward,
    norm_offset=gemma.NORM_OFFSET,
    norm_eps=gemma.NORM_EPS,
    norms=gemma.NORMS,
    sliding_window=own_window,
)
