"""Qwen3: Llama with an RMS norm over each head of q and k, and a sliding window in some layers."""

from transformers.models.qwen3 import modeling_qwen3 as qwen3

from memkernels.integrations.family import Family, own_window

FAMILY = Family(
    norm=qwen3.Qwen3RMSNorm,
    attention=qwen3.Qwen3Attention,
    mlp=qwen3.Qwen3MLP,
    decoder_layer=qwen3.Qwen3DecoderLayer,
    model=qwen3.Qwen3Model,
    causal_lm=qwen3.Qwen3ForCausalLM,
    eager_attention=qwen3.eager_attention_forward,
    sliding_window=own_window,
)
