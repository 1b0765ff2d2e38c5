"""DeepSeek-V3: latent attention, and experts beside a shared one instead of the MLPs of all but the first layers."""

from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek_v3

from memkernels.integrations.family import Family

FAMILY = Family(
    norm=deepseek_v3.DeepseekV3RMSNorm,
    attention=deepseek_v3.DeepseekV3Attention,
    mlp=deepseek_v3.DeepseekV3MLP,
    decoder_layer=None,
    model=None,
    causal_lm=deepseek_v3.DeepseekV3ForCausalLM,
    eager_attention=deepseek_v3.eager_attention_forward,
    attention_left="it is latent attention",
    experts=deepseek_v3.DeepseekV3Experts,
)
