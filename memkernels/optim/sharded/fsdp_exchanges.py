"""FSDP2's all-gathers and reduce-scatters: what goes before each of them, and what is raised where one fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
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

    def run(self, collective: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if self.listen is not None:
            self.listen()
        with exchanging():
            return collective(*arguments, **options)


class _AllGather(DefaultAllGather):
    def __init__(self, exchanges: Exchanges) -> None:
        self._exchanges = exchanges

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._exchanges.run(super().__call__, *arguments, **options)


class _ReduceScatter(DefaultReduceScatter):
    def __init__(self, exchanges: Exchanges) -> None:
        self._exchanges = exchanges

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._exchanges.run(super().__call__, *arguments, **options)
