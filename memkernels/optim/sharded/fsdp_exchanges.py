"""FSDP2's all-gathers and reduce-scatters: what goes before each of them, and what is raised where one fails."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

from memkernels.optim.agreement import exchanging


class Exchanges:
    """Those of a model's modules that `fully_shard` has been applied to. One that fails raises RankFailure."""

    def __init__(self) -> None:
        self.listen: Callable[[], None] | None = None

    @classmethod
    def of(cls, model: FSDPModule) -> Exchanges:
        """Those of a model, whichever of its optimizers asks."""
        exchanges = getattr(model, "_memkernels_exchanges", None)
        if exchanges is None:
            exchanges = model._memkernels_exchanges = cls()  # type: ignore[attr-defined]
            for module in cast(torch.nn.Module, model).modules():
                if isinstance(module, FSDPModule):
                    module.set_custom_all_gather(_AllGather(exchanges))
                    module.set_custom_reduce_scatter(_ReduceScatter(exchanges))
        return exchanges

    @contextmanager
    def after(self, listen: Callable[[], None]) -> Iterator[None]:
        """Within it `listen()` goes before each exchange, which is left out where it raises."""
        self.listen = listen
        try:
            yield
        finally:
            self.listen = None

    def run(self, exchange: Callable[[], Any], whole: Tensor, group: dist.ProcessGroup) -> Any:
        """exchange(), of which `whole` is the larger tensor."""
        if self.listen is not None:
            if whole.is_cpu:
                torch.empty_like(whole)  # gloo makes one within the exchange, when it is too late to run out of memory
            self.listen()
        with exchanging(group, begun=True):
            return exchange()


class _AllGather(DefaultAllGather):
    def __init__(self, exchanges: Exchanges) -> None:
        self._exchanges = exchanges

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        exchange = functools.partial(super().__call__, output_tensor, input_tensor, group, async_op)
        return self._exchanges.run(exchange, output_tensor, group)


class _ReduceScatter(DefaultReduceScatter):
    def __init__(self, exchanges: Exchanges) -> None:
        self._exchanges = exchanges

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        exchange = functools.partial(super().__call__, output_tensor, input_tensor, group, op, async_op)
        return self._exchanges.run(exchange, input_tensor, group)
