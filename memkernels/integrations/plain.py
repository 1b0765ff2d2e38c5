"""Whether a module does nothing but its computation, so that an op may take its tensors and not call it."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from memkernels.integrations.replacement import Forward
from memkernels.ops.checks import PLAIN_TENSORS
from memkernels.ops.quantized.tensor import QuantizedTensor


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module runs more than its class's forward: hooks, or weights that accelerate moves in."""
    moved = getattr(getattr(module, "_hf_hook", None), "offload", False)
    return bool(
        moved
        or not all(_is_idle(hook) for hook in module._forward_hooks.values())
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _is_idle(hook: Any) -> bool:
    """Whether transformers left it on a layer when a call asked for outputs of layers, and this call asks for none."""
    capturing = sys.modules.get("transformers.utils.output_capturing")
    if capturing is None or getattr(hook, "__module__", None) != capturing.__name__:
        return False
    collector = capturing._active_collector
    if torch.compiler.is_compiling():  # which cannot trace a ContextVar: transformers has another variable for it
        return not (collector.compiling and collector.global_var)
    return not collector.get()


def is_plain_linear(module: Any, kind: type[nn.Module] = nn.Linear, *, quantized: bool = False) -> bool:
    """A torch.nn.Linear (or `kind`) with a plain weight: no adapter, no quantised or distributed weight, no hooks.

    With `quantized` its weight may also be one of `memkernels.quant`.
    """
    return (
        type(module) is kind
        and (type(module.weight) in PLAIN_TENSORS or (quantized and isinstance(module.weight, QuantizedTensor)))
        and not has_hooks(module)
        and not has_foreign_forward(module)
    )


def slot(module: nn.Module) -> str:
    """Where a module's own forward is: a hook of accelerate (device_map) keeps it under another name."""
    return "_old_forward" if hasattr(module, "_hf_hook") else "forward"


def replaced_slot(module: nn.Module) -> str | None:
    """Where a replacement stands, if `patch` put one on this instance.

    accelerate keeps it under other names: behind a hook, or where it casts what a forward in mixed precision returns;
    and its unwrap_model, which takes the cast away, makes a method of it.
    """
    for place in ("forward", "_old_forward", "_original_forward"):
        current = module.__dict__.get(place)
        current = getattr(current, "__func__", current)
        if isinstance(current, Forward) and current.func.__module__.startswith("memkernels.integrations."):
            return place
    return None


def has_foreign_forward(module: nn.Module) -> bool:
    """Whether someone put another forward on this instance than its class's."""
    current = module.__dict__.get(slot(module))
    return current is not None and getattr(current, "__func__", None) is not type(module).forward


def is_own(module: nn.Module) -> bool:
    """Whether calling the module runs its class's forward, or what `patch` put in its place, and no hooks."""
    return not has_hooks(module) and (replaced_slot(module) is not None or not has_foreign_forward(module))


def is_off(dropout: nn.Module) -> bool:
    """Whether a torch.nn.Dropout drops nothing in this call, and nobody looks at it."""
    return type(dropout) is nn.Dropout and not has_hooks(dropout) and (dropout.p == 0 or not dropout.training)
