"""Mistral: Llama with a sliding window, the same in every layer."""

from transformers.models.mistral import modeling_mistral as mistral

from memkernels.integrations.family import Family, configured_window

FAMILY = Family(
    norm=mistral.MistralRMSNorm,
    attention=mistral.MistralAttention,
    mlp=mistral.MistralMLP,
    decoder_layer=mistral.MistralDecoderLayer,
    model=mistral.MistralModel,
    causal_lm=mistral.MistralForCausalLM,
    eager_attention=mistral.eager_attention_forward,
    sliding_window=configured_window,
)
