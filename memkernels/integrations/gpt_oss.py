"""gpt-oss: sinks in attention, a sliding window in every other layer, experts instead of an MLP."""

from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss

from memkernels.integrations.family import Family, own_window

FAMILY = Family(
    norm=gpt_oss.GptOssRMSNorm,
    attention=gpt_oss.GptOssAttention,
    mlp=None,
    decoder_layer=gpt_oss.GptOssDecoderLayer,
    model=gpt_oss.GptOssModel,
    causal_lm=gpt_oss.GptOssForCausalLM,
    eager_attention=gpt_oss.eager_attention_forward,
    outputs=MoeCausalLMOutputWithPast,
    experts=gpt_oss.GptOssExperts,
    experts_left="their gate is clamped, and they have biases",
    half_tables=True,
    sliding_window=own_window,
)
