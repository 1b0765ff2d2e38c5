"""Qwen2-VL: Qwen2 whose tokens have positions in time, height and width; images by layer norms, ungated MLPs."""

from torch import nn
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2_vl

from memkernels.integrations import qwen_vl
from memkernels.integrations.family import Family, VisionTower, own_window

FAMILY = Family(
    norm=qwen2_vl.Qwen2VLRMSNorm,
    attention=qwen2_vl.Qwen2VLAttention,
    mlp=qwen2_vl.Qwen2MLP,
    decoder_layer=qwen2_vl.Qwen2VLDecoderLayer,
    model=qwen2_vl.Qwen2VLTextModel,
    causal_lm=qwen2_vl.Qwen2VLForConditionalGeneration,
    eager_attention=qwen2_vl.eager_attention_forward,
    outputs=qwen2_vl.MultimodalCausalLMOutputWithPast,
    sliding_window=own_window,
    positions=qwen_vl.positions,
    sequence_positions=qwen_vl.sequence_positions,
    vision=VisionTower(
        attention=qwen2_vl.VisionAttention,
        mlp=qwen2_vl.VisionMlp,
        block=qwen2_vl.Qwen2VLVisionBlock,
        norm=nn.LayerNorm,
        gate_up=(None, "fc1"),
        down="fc2",
        activation="act",
    ),
)
