"""New values of parameters from the ranks that computed them, on their way while the next forward begins."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from memkernels.optim.agreement import Exchange, backends_of, start, wait_for
from memkernels.optim.sharded.layout import Bucket
from memkernels.optim.sharded.whole import Owners

_CONTAINERS = (torch.nn.ModuleList, torch.nn.Sequential)


class Gatherer:
    """Brings each bucket's ranges together, or each parameter from its owner, and has modules wait for what they use.

    A model's layers (`layers_of`) wait for their own parameters when they are called; any other module, for those that
    it has outside of these. The buckets that hold some outside of layers are gathered first.
    """

    def __init__(
        self, model: torch.nn.Module, buckets: Sequence[Bucket], values: Sequence[Tensor], group: dist.ProcessGroup,
        owners: Owners | None = None,
    ) -> None:  # fmt: skip
        self._buckets, self._values, self._group, self._owners = buckets, values, group, owners
        self._rank = dist.get_rank(group)
        self._broadcasts = bool(values) and backends_of(group).get(values[0].device.type) == "gloo"
        self._coming: dict[int, list[Exchange]] = {}
        bucket_of = {piece.parameter: i for i, bucket in enumerate(buckets) for piece in bucket.pieces}
        layers = list(layers_of(model))
        within = {module for layer in layers for module in layer.modules()}
        outside = [module for module in model.modules() if module not in within]
        for layer in layers:
            self._wait_when_called(layer, {bucket_of[p] for p in layer.parameters() if p in bucket_of})
        direct = {
            module: {bucket_of[p] for p in module.parameters(recurse=False) if p in bucket_of} for module in outside
        }
        for module in outside:
            self._wait_when_called(module, set().union(*(direct.get(part, set()) for part in module.modules())))
        first = set().union(*direct.values())
        self._order = sorted(range(len(buckets)), key=lambda i: (i not in first, -i))
        for module in model.modules():
            module.register_state_dict_pre_hook(lambda *_: self.wait())
            module.register_load_state_dict_pre_hook(lambda *_: self.wait())

    def start(self) -> None:
        """Begins to gather every bucket; this rank's ranges are new."""
        if dist.get_world_size(self._group) == 1:
            return
        for i in self._order:
            self._coming[i] = list(self._gather(self._buckets[i], self._values[i]))

    def wait(self, buckets: Iterable[int] | None = None) -> None:
        """Until these buckets have come; all of them by default."""
        for i in list(self._coming) if buckets is None else buckets:
            for exchange in self._coming.pop(i, ()):
                wait_for(exchange)

    def check_places(self) -> None:
        """Raises RuntimeError where a parameter has other memory than its bucket's, which new values come into."""
        for bucket, values in zip(self._buckets, self._values, strict=True):
            for piece in bucket.pieces:
                place = values.data_ptr() + piece.start * values.element_size()
                if piece.parameter.numel() and piece.parameter.data_ptr() != place:
                    raise RuntimeError(
                        f"{piece.name}: its memory is another than when the optimizer was made, so that no step reaches"
                        " it: move, convert or assign parameters before, or make the optimizer anew."
                    )

    def is_coming(self, bucket: int) -> bool:
        """Whether nobody has waited for a bucket yet."""
        return bucket in self._coming

    def _gather(self, bucket: Bucket, values: Tensor) -> Iterable[Exchange]:
        if self._owners is not None:
            for piece in (piece for piece in bucket.pieces if piece.parameter.numel()):
                whole = bucket.view(values, piece).view(-1)
                yield start(dist.broadcast, whole, group=self._group, group_src=self._owners.of(piece))
            return
        if not self._broadcasts:
            yield start(dist.all_gather_into_tensor, values, bucket.shard(values, self._rank), group=self._group)
            return
        for rank in range(bucket.ranks):  # gloo's all-gather goes through a copy of the whole
            yield start(dist.broadcast, bucket.shard(values, rank), group=self._group, group_src=rank)

    def _wait_when_called(self, module: torch.nn.Module, buckets: set[int]) -> None:
        if buckets:
            module.register_forward_pre_hook(lambda *_: self.wait(sorted(buckets)))


def layers_of(module: torch.nn.Module) -> Iterable[torch.nn.Module]:
    """The elements of a model's outermost `ModuleList`s and `Sequential`s; of those that are never called, such as
    another `ModuleList`, the modules in them."""
    for child in module.children():
        if isinstance(module, _CONTAINERS):
            yield from _called(child)
        else:
            yield from layers_of(child)


def _called(module: torch.nn.Module) -> Iterable[torch.nn.Module]:
    """The module, or what is in it where it has no forward."""
    if type(module).forward is not torch.nn.Module.forward:
        yield module
    else:
        for child in module.children():
            yield from _called(child)
