"""The attention sublayers of SwitchTransformers, computed again in backward: transformers' own keep (S, S) scores."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.models.switch_transformers import modeling_switch_transformers as switch

from memkernels.integrations.masks import has_cache
from memkernels.integrations.replacement import by_name

SUBLAYERS: dict[type, str] = {
    switch.SwitchTransformersLayerSelfAttention: "SelfAttention",
    switch.SwitchTransformersLayerCrossAttention: "EncDecAttention",
}


def attention_forward(layer: Any, hidden_states: Tensor, *args, names: tuple[str, ...], **kwargs) -> tuple:
    """The sublayer under torch.utils.checkpoint: in training, without a cache, where its layer is not checkpointed."""
    kwargs |= by_name(names, args)
    forward = partial(type(layer).forward, layer, **kwargs)
    checkpointed = getattr(layer, SUBLAYERS[type(layer)]).gradient_checkpointing
    if not layer.training or not torch.is_grad_enabled() or checkpointed or has_cache(kwargs):
        return forward(hidden_states)
    return checkpoint(forward, hidden_states, use_reentrant=False)
