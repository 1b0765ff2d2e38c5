"""Qwen2: Llama with biases on q, k and v, and a sliding window in some layers."""

from transformers.models.qwen2 import modeling_qwen2 as qwen2

from memkernels.integrations.family import Family, own_window

FAMILY = Family(
    norm=qwen2.Qwen2RMSNorm,
    attention=qwen2.Qwen2Attention,
    mlp=qwen2.Qwen2MLP,
    decoder_layer=qwen2.Qwen2DecoderLayer,
    model=qwen2.Qwen2Model,
    causal_lm=qwen2.Qwen2ForCausalLM,
    eager_attention=qwen2.eager_attention_forward,
    sliding_window=own_window,
)
