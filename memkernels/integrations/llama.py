"""Llama."""

from transformers.models.llama import modeling_llama as llama

from memkernels.integrations.family import Family

FAMILY = Family(
    norm=llama.LlamaRMSNorm,
    attention=llama.LlamaAttention,
    mlp=llama.LlamaMLP,
    decoder_layer=llama.LlamaDecoderLayer,
    model=llama.LlamaModel,
    causal_lm=llama.LlamaForCausalLM,
    eager_attention=llama.eager_attention_forward,
)
