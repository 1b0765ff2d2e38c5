"""Qwen2-MoE: Qwen2 with experts, beside a shared one, instead of the MLP of some layers."""

from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.qwen2_moe import modeling_qwen2_moe as qwen2_moe

from memkernels.integrations.family import Family, own_window

FAMILY = Family(
    norm=qwen2_moe.Qwen2MoeRMSNorm,
    attention=qwen2_moe.Qwen2MoeAttention,
    mlp=qwen2_moe.Qwen2MoeMLP,
    decoder_layer=qwen2_moe.Qwen2MoeDecoderLayer,
    model=qwen2_moe.Qwen2MoeModel,
    causal_lm=qwen2_moe.Qwen2MoeForCausalLM,
    eager_attention=qwen2_moe.eager_attention_forward,
    outputs=MoeCausalLMOutputWithPast,
    experts=qwen2_moe.Qwen2MoeExperts,
    router_loss=qwen2_moe.load_balancing_loss_func,
    sliding_window=own_window,
)
