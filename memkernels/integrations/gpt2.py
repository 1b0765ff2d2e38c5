"""GPT-2: layer norms, learned positions, one projection for q, k and v, weights transposed, an ungated MLP."""

from __future__ import annotations

from typing import Any

from transformers.models.gpt2 import modeling_gpt2 as gpt2

from memkernels.integrations.family import CustomFamily
from memkernels.integrations.gpt2_attention import plan_attention
from memkernels.integrations.gpt2_layer import plan_layer
from memkernels.integrations.gpt2_mlp import plan_mlp
from memkernels.integrations.loss import plan_loss
from memkernels.integrations.model import plan_cacheless
from memkernels.integrations.replacement import Replacement


def plan(module: Any, recompute: str, loss: bool) -> Replacement | None:
    kind = type(module)
    if kind is gpt2.GPT2Attention:
        return plan_attention(module)
    if kind is gpt2.GPT2MLP:
        return plan_mlp(module, recompute != "none")
    if kind is gpt2.GPT2Block and recompute != "none":
        return plan_layer(module, recompute)
    if kind is gpt2.GPT2Model:
        return plan_cacheless(module, before_cache=1)
    if kind is gpt2.GPT2LMHeadModel and loss:
        if module.config.add_cross_attention:
            return Replacement("head and loss", left="its outputs have cross attention")
        return plan_loss(module)
    return None


FAMILY = CustomFamily(plan)
