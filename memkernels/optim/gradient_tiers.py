"""Sums of gradients in host memory or on disk between the backwards of a step."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from memkernels.offload.budget import Claim
from memkernels.offload.store import Stored, Tier, TieredStore
from memkernels.optim.checks import check_moving
from memkernels.optim.operators import square_sum
from memkernels.optim.optimizer import LowMemoryOptimizer


def offload_gradients(
    optimizer: LowMemoryOptimizer,
    tier: Tier,
    *,
    max_host_bytes: int | None = None,
    path: str | os.PathLike[str] | None = None,
    min_bytes: int = 1 << 20,
    prefetch: int = 2,
) -> None:
    """Keeps the gradients of a batch in parts on a tier, but for that of the parameter backward or the step is at.

        optimizer = memkernels.optim.AdamW(model.parameters(), lr=1e-4)
        memkernels.optim.offload_gradients(optimizer, "disk", path="/scratch")
        for part in parts:
            (loss_of(model, part) / len(parts)).backward()
        optimizer.step(max_norm=1.0)

    As soon as backward has a parameter's gradient it is added to the sum on the tier, and its memory is free. A step
    takes the sums one by one and consumes them, with those that stayed in memory: no `zero_grad` is needed. It gives
    the bits that gradients in memory give; with max_norm but for the order in which float64 squares are added up. Until
    the step `grad` is None, so that `torch.nn.utils.clip_grad_norm_` sees nothing: pass `max_norm`. Gradients that no
    step takes go with `optimizer.zero_grad()`, not with the model's.

    A backward moves each sum to the tier, and the one before it back. Of a batch in one part `step_in_backward` moves
    nothing, and needs less memory. A batch in parts by `micro_batch`, losses scaled by `torch.amp.GradScaler`, and
    wrappers that reduce gradients between ranks, as DistributedDataParallel does, are not supported; a loss scale of
    one's own is (`step(loss_scale=...)`). A `ShardedOptimizer` has an `offload_gradients` of its own.

    Args:
        optimizer: of this package; of parameters that it has now.
        tier: "host": memory of the host; gradients of CPU parameters are there and stay. "disk": a file without a name.
            "auto": host memory to its limit, then disk. As `memkernels.offload.offload_activations` has them, with its
            `max_host_bytes` and `path`.
        min_bytes: smaller gradients stay; those of DTensors, and of a backward with create_graph, stay in any case.
        prefetch: of how many parameters sums are read ahead.

    Raises:
        TypeError: optimizer is not of this package, or max_host_bytes no integer.
        ValueError: min_bytes, prefetch, or one of those of `TieredStore`, does not fit; the gradients are offloaded
            already, or taken by `step_in_backward`.
        OSError: path does not exist or cannot be written. In a backward: the disk is full; in a backward or a step: a
            write that was thought to be done failed again, a read failed, or a checksum does not match. The batch's
            gradients are then to be dropped by `optimizer.zero_grad()`. Parameters are as they were, but where a step
            failed, which has stepped those up to the one whose sum could not be read.
        MemoryError: a gradient does not fit into max_host_bytes; as where the disk is full.
    """
    if not isinstance(optimizer, LowMemoryOptimizer):
        raise TypeError(f"optimizer: expected one of memkernels.optim, got {type(optimizer).__name__}.")
    check_moving(min_bytes, prefetch)
    if optimizer.gradient_tiers is not None:
        raise ValueError("optimizer: its gradients are offloaded already.")
    params = [param for group in optimizer.param_groups for param in group["params"] if param.requires_grad]
    if any(hasattr(hook, "steps") for param in params for hook in _hooks(param)):
        raise ValueError("optimizer: expected one that steps after backward, got that of step_in_backward.")
    store = TieredStore(tier, max_host_bytes=max_host_bytes, path=path)
    optimizer.gradient_tiers = GradientTiers(params, store, min_bytes, prefetch)


class _Hook:
    """What autograd calls with a parameter whose gradient is complete; `micro_batch` knows such a parameter by it.

    It does not keep the tiers alive: Python's collector does not see what autograd's hooks hold.
    """

    offloads = True

    def __init__(self, tiers: GradientTiers, before: Sequence[Tensor]) -> None:
        self._tiers, self._before = weakref.ref(tiers), before

    def __call__(self, param: Tensor) -> None:
        tiers = self._tiers()
        if tiers is not None:
            tiers.take(param, self._before)


@dataclass
class _Sum:
    """A sum of gradients on the tier, and the sum of its squares, float64."""

    stored: Stored
    square: Tensor


class GradientTiers:
    """Where gradients are until the step that takes them.

    Args:
        params: those whose gradients move; backward comes to the last first.
    """

    def __init__(self, params: Sequence[Tensor], store: TieredStore, min_bytes: int, prefetch: int) -> None:
        self.store = store
        self._min_bytes, self._prefetch = min_bytes, prefetch
        self._sums: dict[Tensor, _Sum] = {}
        self._claims: dict[Tensor, Claim] = {}  # of those in host memory as they are
        for i, param in enumerate(params):
            param.register_post_accumulate_grad_hook(_Hook(self, params[:i][::-1]))

    @torch.no_grad()
    def take(self, param: Tensor, then: Sequence[Tensor]) -> None:
        """Adds the gradient of `param` to the sum; those of `then` come next."""
        grad = param.grad
        if grad is None or not _moves(param, grad):
            return
        if param in self._sums:
            grad = param.grad = self._load(param, then).add_(grad)
            del self._sums[param]  # so that its place on disk is free
        nbytes = grad.numel() * grad.element_size()
        if nbytes < self._min_bytes or param in self._claims:
            return
        claim = self.store.claim_in_place(grad.device, nbytes)
        if claim is not None:
            self._claims[param] = claim
            return
        flat = grad.contiguous().view(-1).view(torch.uint8)
        self._sums[param] = _Sum(self.store.put(flat), square_sum([grad]))
        param.grad = None

    def has(self, param: Tensor) -> bool:
        """Whether the step is to take a gradient of it."""
        return param.grad is not None or param in self._sums

    def squares(self) -> list[Tensor]:
        """Of each sum on the tier the sum of its squares. Those of which a part stayed in memory come there before."""
        for param in [param for param in self._sums if param.grad is not None]:
            self._complete(param, ())
        return [kept.square for kept in self._sums.values()]

    @contextmanager
    def fetched(self, param: Tensor, then: Sequence[Tensor]) -> Iterator[None]:
        """Within it `grad` of `param` is the sum, in memory; those of `then` come next. Afterwards it is gone."""
        if param in self._sums:
            self._complete(param, then)
        try:
            yield
        finally:
            param.grad = None
            self._claims.pop(param, None)

    def drop(self) -> None:
        """No gradients."""
        self._sums, self._claims = {}, {}

    def _complete(self, param: Tensor, then: Sequence[Tensor]) -> None:
        """Makes `grad` of `param` the sum of what is in memory and what is on the tier."""
        total = self._load(param, then)
        param.grad = total if param.grad is None else param.grad + total
        del self._sums[param]

    def _load(self, param: Tensor, then: Sequence[Tensor]) -> Tensor:
        ahead = (self._sums[other].stored for other in then if other in self._sums)
        flat = self.store.load(self._sums[param].stored, list(islice(ahead, self._prefetch)))
        return flat.view(param.dtype).view(param.shape)


def _moves(param: Tensor, grad: Tensor) -> bool:
    """Gradients that the step refuses stay, for it to say so, and so do those that are part of a graph."""
    return (
        type(grad) is Tensor and grad.layout == torch.strided and grad.dtype == param.dtype and not grad.requires_grad
    )


def _hooks(param: Tensor) -> Sequence[Any]:
    return list((getattr(param, "_post_accumulate_grad_hooks", None) or {}).values())
