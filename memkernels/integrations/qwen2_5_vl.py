"""Qwen2.5-VL: Qwen2 whose tokens have positions in time, height and width; images by RMS norms, gated MLPs, windows."""

from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5_vl

from memkernels.integrations import qwen_vl
from memkernels.integrations.family import Family, VisionTower, own_window

FAMILY = Family(
    norm=qwen2_5_vl.Qwen2_5_VLRMSNorm,
    attention=qwen2_5_vl.Qwen2_5_VLAttention,
    mlp=qwen2_5_vl.Qwen2MLP,
    decoder_layer=qwen2_5_vl.Qwen2_5_VLDecoderLayer,
    model=qwen2_5_vl.Qwen2_5_VLTextModel,
    causal_lm=qwen2_5_vl.Qwen2_5_VLForConditionalGeneration,
    eager_attention=qwen2_5_vl.eager_attention_forward,
    outputs=qwen2_5_vl.MultimodalCausalLMOutputWithPast,
    sliding_window=own_window,
    positions=qwen_vl.positions,
    sequence_positions=qwen_vl.sequence_positions,
    vision=VisionTower(
        attention=qwen2_5_vl.Qwen2_5_VLVisionAttention,
        mlp=qwen2_5_vl.Qwen2_5_VLMLP,
        block=qwen2_5_vl.Qwen2_5_VLVisionBlock,
        norm=qwen2_5_vl.Qwen2_5_VLRMSNorm,
    ),
)
