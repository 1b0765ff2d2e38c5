"""A step with what autograd saves on disk."""

from __future__ import annotations

from dataclasses import replace

import torch

from memkernels.bench.step import Step
from memkernels.offload import offload_activations


def offloaded(step: Step, *, keep_last_layers: int = 1) -> Step:
    """The step under `offload_activations`, whose staging blocks are part of its peak."""
    offload = offload_activations("disk", keep_last_layers=keep_last_layers)

    def forward() -> torch.Tensor | tuple[torch.Tensor, ...]:
        with offload:
            return step.forward()

    def release() -> None:
        nonlocal offload
        offload = offload_activations("disk", keep_last_layers=keep_last_layers)

    return replace(step, forward=forward, release=release)
