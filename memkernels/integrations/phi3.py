"""Phi-3: Llama with q, k and v as one projection, gate and up as another, a partial rotation and residual dropout."""

from transformers.models.phi3 import modeling_phi3 as phi3

from memkernels.integrations.family import Family, configured_window

FAMILY = Family(
    norm=phi3.Phi3RMSNorm,
    attention=phi3.Phi3Attention,
    mlp=phi3.Phi3MLP,
    decoder_layer=phi3.Phi3DecoderLayer,
    model=phi3.Phi3Model,
    causal_lm=phi3.Phi3ForCausalLM,
    eager_attention=phi3.eager_attention_forward,
    dropouts=("resid_attn_dropout", "resid_mlp_dropout"),
    qkv=("qkv_proj",),
    gate_up=("gate_up_proj",),
    activation="activation_fn",
    sliding_window=configured_window,
)
