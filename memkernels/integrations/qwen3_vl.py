"""Qwen3-VL: Qwen3 whose tokens have positions in time, height and width; images by layer norms, ungated MLPs."""

from torch import nn
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3_vl

from memkernels.integrations import qwen_vl
from memkernels.integrations.family import Family, VisionTower


def _sequence_positions(position_ids):
    if position_ids is not None and position_ids.dim() == 2:
        return position_ids
    return qwen_vl.sequence_positions(position_ids)


FAMILY = Family(
    norm=qwen3_vl.Qwen3VLTextRMSNorm,
    attention=qwen3_vl.Qwen3VLTextAttention,
    mlp=qwen3_vl.Qwen3VLTextMLP,
    decoder_layer=qwen3_vl.Qwen3VLTextDecoderLayer,
    model=qwen3_vl.Qwen3VLTextModel,
    causal_lm=qwen3_vl.Qwen3VLForConditionalGeneration,
    eager_attention=qwen3_vl.eager_attention_forward,
    outputs=qwen3_vl.MultimodalCausalLMOutputWithPast,
    positions=qwen_vl.positions,
    sequence_positions=_sequence_positions,
    vision=VisionTower(
        attention=qwen3_vl.Qwen3VLVisionAttention,
        mlp=qwen3_vl.Qwen3VLVisionMLP,
        block=qwen3_vl.Qwen3VLVisionBlock,
        norm=nn.LayerNorm,
        gate_up=(None, "linear_fc1"),
        down="linear_fc2",
    ),
)
