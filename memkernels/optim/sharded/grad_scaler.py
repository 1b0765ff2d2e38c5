"""The scale of float16's losses, which ranks with parts of the gradients choose together."""

from __future__ import annotations

import torch
from torch import Tensor

from memkernels.optim.sharded.optimizer import ShardedOptimizer


class ShardedGradScaler(torch.amp.GradScaler):
    """`torch.amp.GradScaler` for a `ShardedOptimizer`, of any stage:

        scaler = ShardedGradScaler("cuda")
        scaler.scale(loss).backward()
        scaler.step(optimizer, max_norm=1.0)
        scaler.update()

    torch's judges on each rank the gradients that are there. With this one a gradient that is not finite on one rank is
    found by all: none steps, and all have the same scale next. The division by the scale is part of the step, or, with
    `unscale_(optimizer)`, a pass over this rank's gradients before it. Other optimizers are as with torch's.
    """

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        if not isinstance(optimizer, ShardedOptimizer):
            return super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        finite = optimizer.unscale(inv_scale.item())
        return {found_inf.device: found_inf.fill_(0.0 if finite else 1.0)}
