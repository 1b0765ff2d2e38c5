"""SwitchTransformers: T5's encoder and decoder, with experts of weights of their own in every other layer."""

from __future__ import annotations

from typing import Any

from transformers.models.switch_transformers import modeling_switch_transformers as switch

from memkernels.integrations.family import CustomFamily
from memkernels.integrations.mlp import activation_name
from memkernels.integrations.replacement import Replacement, argument_names, bind
from memkernels.integrations.switch_attention import SUBLAYERS, attention_forward
from memkernels.integrations.switch_experts import plan_experts
from memkernels.integrations.switch_ffn import feed_forward, mlp_forward, norm_forward
from memkernels.integrations.switch_loss import loss_forward, why_not


def plan(module: Any, recompute: str, loss: bool) -> Replacement | None:
    kind = type(module)
    if kind is switch.SwitchTransformersLayerNorm:
        return Replacement("RMS norm", bind(norm_forward, module))
    if kind is switch.SwitchTransformersAttention:
        return Replacement("attention", left="its scores have a learned bias of relative positions")
    if kind in SUBLAYERS and recompute == "layer":
        return Replacement("attention sublayer", bind(attention_forward, module, names=argument_names(module)[1:]))
    if kind is switch.SwitchTransformersExperts:
        return plan_experts(module, recompute != "none")
    if kind is switch.SwitchTransformersDenseActDense:
        if activation_name(module.act) is None:
            return Replacement("MLP", left=f"memkernels has no activation {type(module.act).__name__}")
        return Replacement("MLP", bind(mlp_forward, module, recompute=recompute != "none"))
    if kind is switch.SwitchTransformersLayerFF and not module.is_sparse and recompute != "none":
        return Replacement("feed-forward layer", bind(feed_forward, module))
    if kind is switch.SwitchTransformersForConditionalGeneration and loss:
        left = why_not(module)
        forward = bind(loss_forward, module, names=argument_names(module)) if left is None else None
        return Replacement("head and loss", forward, left)
    return None


FAMILY = CustomFamily(plan)
