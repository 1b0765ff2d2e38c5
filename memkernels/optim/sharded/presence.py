"""Which parameters have a gradient on any rank at stage 3, where FSDP2 adds up zeros of those that have none."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from memkernels.optim.agreement import device_of, start, wait_for
from memkernels.optim.local import local_of


class Presence:
    """Notes whose gradients backward completes on this rank.

    A rank without a gradient for a parameter has FSDP2 send zeros, so that the others' sums fit, where torch's can
    (`set_reduce_scatter_unused_params`); otherwise every rank needs one for the same parameters.
    """

    def __init__(self, model: FSDPModule) -> None:
        # By id: what autograd's hooks hold Python's collector does not see, so that they hold no parameter.
        self._here: set[int] = set()
        self._hooked: set[int] = set()
        if hasattr(model, "set_reduce_scatter_unused_params"):
            model.set_reduce_scatter_unused_params(True)
        for module in cast(torch.nn.Module, model).modules():
            if isinstance(module, FSDPModule):
                module.register_forward_hook(self._attach)

    def clear(self) -> None:
        self._here.clear()

    def drop_absent(self, parameters: Sequence[Tensor], group: dist.ProcessGroup) -> None:
        """Makes `grad` None of those that no rank had a gradient for; every rank calls it."""
        flags = torch.tensor([float(self._has(parameter)) for parameter in parameters], device=device_of(group))
        wait_for(start(dist.all_reduce, flags, group=group))
        for parameter, flag in zip(parameters, flags.tolist(), strict=True):
            if not flag:
                parameter.grad = None

    def _has(self, parameter: Tensor) -> bool:
        """A gradient that is not zero has been put there by other means than a backward."""
        if id(parameter) in self._here or parameter.grad is None:
            return id(parameter) in self._here
        return bool(local_of(parameter.grad).any())

    def _attach(self, module: torch.nn.Module, *_: Any) -> None:
        """The whole parameters, which backward has gradients of, are there after the first forward."""
        for group in cast(FSDPModule, module)._get_fsdp_state()._fsdp_param_groups:
            for of in group.fsdp_params:
                parameter = id(of.sharded_param)
                if parameter not in self._hooked and of.sharded_param.requires_grad:
                    self._hooked.add(parameter)
                    note = functools.partial(_note, self._here, parameter)
                    of._unsharded_param.register_post_accumulate_grad_hook(note)


def _note(here: set[int], parameter: int, _: Tensor) -> None:
    here.add(parameter)
