"""The gated activation in plain PyTorch: the specification, and the fallback where no kernel runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
}


def gated_activation(gate: Tensor, up: Tensor | None = None, activation: str = "silu") -> Tensor:
    """h = act(gate) * up; act(gate) without up."""
    activated = ACTIVATIONS[activation](gate)
    return activated if up is None else activated * up
