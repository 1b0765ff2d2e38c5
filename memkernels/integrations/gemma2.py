"""Gemma 2: scores and logits with a soft cap, and a sliding window in every other layer."""

from transformers.models.gemma2 import modeling_gemma2 as gemma2

from memkernels.integrations import gemma
from memkernels.integrations.family import Family, own_window

FAMILY = Family(
    norm=gemma2.Gemma2RMSNorm,
    attention=gemma2.Gemma2Attention,
    mlp=gemma2.Gemma2MLP,
    decoder_layer=gemma2.Gemma2DecoderLayer,
    model=gemma2.Gemma2Model,
    causal_lm=gemma2.Gemma2ForCausalLM,
    eager_attention=gemma2.eager_attention_forward,
    norm_offset=gemma.NORM_OFFSET,
    norm_eps=gemma.NORM_EPS,
    norms=gemma.NORMS,
    sliding_window=own_window,
)
