"""The stack of decoder layers: no cache that nobody asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from memkernels.integrations.attention import has_cache
from memkernels.integrations.replacement import Replacement, bind

# Of LlamaModel.forward: a sixth positional argument is use_cache, a fourth the cache.
_BEFORE_CACHE = 3


def plan_model(model: nn.Module) -> Replacement:
    return Replacement("model without a cache in training", bind(model_forward, model))


def model_forward(model: Any, *args, **kwargs) -> Any:
    """In training no cache unless the call asks for one, as transformers has it under gradient checkpointing.

    Its configurations ask for one by default, and attention that fills a cache cannot be computed again.
    """
    asked = len(args) > _BEFORE_CACHE or kwargs.get("use_cache") is not None or has_cache(kwargs)
    if model.training and torch.is_grad_enabled() and not asked:
        kwargs["use_cache"] = False
    return type(model).forward(model, *args, **kwargs)
