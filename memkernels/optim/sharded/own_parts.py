"""What one rank has of the parameters at stages 1 and 2, as parameters of an optimizer of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from memkernels.optim.optimizer import LowMemoryOptimizer
from memkernels.optim.sharded.layout import Bucket
from memkernels.optim.sharded.param_groups import named_parameters, with_parameters
from memkernels.optim.sharded.whole import Owners


class _Own(NamedTuple):
    """What this rank steps of a parameter, and where its bucket's sum has this rank's range of it."""

    part: Parameter
    bucket: int
    elements: slice


class OwnParts:
    """This rank's parts of the trained parameters, by place in the whole optimizer.

    A part is the rank's range of the parameter in its bucket, or with `owners` all of it on one rank and nothing on the
    others.

    Args:
        values: of each bucket the parameters' values, of which the parts are views.
    """

    def __init__(self, buckets: Sequence[Bucket], values: Sequence[Tensor], rank: int, owners: Owners | None) -> None:
        self._parts: dict[int, _Own] = {}
        self._origins: dict[Tensor, int] = {}  # the index of a part's first element in its parameter
        for i, (bucket, flat) in enumerate(zip(buckets, values, strict=True)):
            own = bucket.shard(flat, rank)
            for piece in bucket.pieces:
                first, last = bucket.elements_of(piece, rank)
                at = piece.start + first - rank * bucket.shard_size if last > first else 0
                if owners is None:
                    part = Parameter(own[at : at + last - first])
                else:
                    part = Parameter(owners.part(piece, bucket.view(flat, piece)))
                self._parts[piece.place] = _Own(part, i, slice(at, at + last - first))
                self._origins[part] = first if last > first and owners is None else 0

    def __contains__(self, place: int) -> bool:
        return place in self._parts

    def part(self, place: int) -> Parameter:
        return self._parts[place].part

    def make_optimizer(
        self, optimizer_class: type[LowMemoryOptimizer], groups: Sequence[dict[str, Any]], defaults: dict[str, Any]
    ) -> LowMemoryOptimizer:
        """Of the parts, in the groups of the whole optimizer; parameters that are not trained have empty ones."""
        local = []
        named = iter(named_parameters(groups))
        for group in groups:
            places = [next(named) for _ in group["params"]]
            parts = [self.part(i) if i in self else _empty(parameter) for _, parameter, i in places]
            local.append(with_parameters(group, parts))
        optimizer = optimizer_class(local, **defaults)
        optimizer.origins |= self._origins
        return optimizer

    def ranges(self, sums: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """This rank's range of each parameter's sum, by place; `sums`: this rank's shards of buckets, by number."""
        return {place: sums[own.bucket][own.elements] for place, own in self._parts.items() if own.bucket in sums}


def _empty(parameter: Tensor) -> Parameter:
    return Parameter(torch.empty((0,) * max(1, parameter.dim())), requires_grad=False)
