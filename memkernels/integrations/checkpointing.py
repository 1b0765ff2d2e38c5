"""Gradient checkpointing that the user enabled on a layer of transformers, around a replaced forward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from memkernels.integrations.masks import CACHES, has_cache


def run_layer(body: Callable, layer: Any, hidden_states: Tensor, *, whole: bool, **kwargs) -> Tensor:
    """body(layer, hidden_states, whole=..., **kwargs), `whole` in training without a cache alone.

    Gradient checkpointing takes the place of `whole`; as in transformers, a layer that is checkpointed gets no cache.
    """
    if not layer.training or not torch.is_grad_enabled():
        return body(layer, hidden_states, whole=False, **kwargs)
    if layer.gradient_checkpointing:
        kwargs = {name: value for name, value in kwargs.items() if name not in (*CACHES, "use_cache")}
        return layer._gradient_checkpointing_func(partial(body, layer, whole=False, **kwargs), hidden_states)
    return body(layer, hidden_states, whole=whole and not has_cache(kwargs), **kwargs)
