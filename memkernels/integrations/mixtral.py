"""Mixtral: Mistral with experts instead of an MLP."""

from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.mixtral import modeling_mixtral as mixtral

from memkernels.integrations.family import Family, configured_window

FAMILY = Family(
    norm=mixtral.MixtralRMSNorm,
    attention=mixtral.MixtralAttention,
    mlp=None,
    decoder_layer=mixtral.MixtralDecoderLayer,
    model=mixtral.MixtralModel,
    causal_lm=mixtral.MixtralForCausalLM,
    eager_attention=mixtral.eager_attention_forward,
    outputs=MoeCausalLMOutputWithPast,
    experts=mixtral.MixtralExperts,
    router_loss=mixtral.load_balancing_loss_func,
    sliding_window=configured_window,
)
