"""Qwen3-MoE: Qwen3 with experts instead of the MLP of some layers."""

from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe

from memkernels.integrations.family import Family, own_window

FAMILY = Family(
    norm=qwen3_moe.Qwen3MoeRMSNorm,
    attention=qwen3_moe.Qwen3MoeAttention,
    mlp=qwen3_moe.Qwen3MoeMLP,
    decoder_layer=qwen3_moe.Qwen3MoeDecoderLayer,
    model=qwen3_moe.Qwen3MoeModel,
    causal_lm=qwen3_moe.Qwen3MoeForCausalLM,
    eager_attention=qwen3_moe.eager_attention_forward,
    outputs=MoeCausalLMOutputWithPast,
    experts=qwen3_moe.Qwen3MoeExperts,
    router_loss=qwen3_moe.load_balancing_loss_func,
    sliding_window=own_window,
)
