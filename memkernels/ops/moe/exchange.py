"""Rows to the ranks that hold their experts and back: uneven all-to-all exchanges that run beside other work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

# What each rank tells every other before a call's rows, besides how many there are for each expert: the argument, and
# what of it.
FIELDS = (
    ("x", "its dtype"), ("x", "whether it needs a gradient"), ("expert_weights", "whether they need a gradient"),
    ("w_gate_up", "whether it needs a gradient"), ("w_down", "whether it needs a gradient"),
    ("recompute", "its value"),
)  # fmt: skip


class InFlight:
    """Tensors on their way to this rank. What this rank sent lives until they are here."""

    def __init__(self, rows: Tensor, sent: Tensor, works: Sequence[dist.Work]):
        self.rows = rows
        self.sent: Tensor | None = sent
        self.works = works

    def wait(self) -> Tensor:
        """What has come; again without waiting."""
        for work in self.works:
            work.wait()
        self.sent, self.works = None, ()
        return self.rows


@dataclass(frozen=True)
class Exchange:
    """Which rows of one call go from this rank to some of the experts of each rank, and which come for its own.

    Args:
        group: the ranks.
        sent: of the grouped rows, those for each rank.
        received: of the received rows, which are in the order of the ranks, those from each.
    """

    group: dist.ProcessGroup
    sent: list[slice]
    received: list[slice]

    @property
    def num_received(self) -> int:
        return self.received[-1].stop

    def to_experts(self, grouped: Tensor) -> InFlight:
        """Of grouped rows (R, d), those of these experts; ends in the received rows."""
        rows = grouped.new_empty(self.num_received, grouped.shape[1])
        return self._start(rows, self.received, grouped.contiguous(), self.sent)

    def from_experts(self, rows: Tensor, grouped: Tensor) -> InFlight:
        """What the experts made of the received rows, to where these came from; ends in grouped, (R, d)."""
        return self._start(grouped, self.sent, rows.contiguous(), self.received)

    def _start(self, into: Tensor, places: list[slice], of: Tensor, sources: list[slice]) -> InFlight:
        """A send to each rank and a receipt from each, out of the rows and into them; what stays here is copied."""
        own, calls = dist.get_rank(self.group), []
        into[places[own]] = of[sources[own]]
        for rank, (place, source) in enumerate(zip(places, sources, strict=True)):
            for call, rows in ((dist.irecv, into[place]), (dist.isend, of[source])):
                if rank != own and rows.numel():
                    # As bytes, since backends differ in the dtypes they take.
                    calls.append(dist.P2POp(call, rows.view(torch.uint8), group=self.group, group_peer=rank))
        return InFlight(into, of, dist.batch_isend_irecv(calls) if calls else ())


def agree(
    group: dist.ProcessGroup, counts: Tensor, fields: Sequence[object], sizes: Sequence[int]
) -> list[tuple[Exchange, Tensor]]:
    """The exchanges of a call: every rank tells every other its rows for each of the other's experts, and its `FIELDS`.

    The host waits here for the device, since it must know the sizes of what it receives.

    Args:
        group: the ranks; rank r holds experts r E / ranks to (r + 1) E / ranks.
        counts: (E,), int32 or int64: this rank's rows of each expert.
        fields: the values of `FIELDS`, each a torch.dtype or a bool.
        sizes: of the parts of a rank's experts, each of which has an exchange of its own: how many experts.

    Returns:
        Of each part of the experts the exchange, and for each row that this rank will receive, which of the part's
        experts it is for, (rows,), int64.

    Raises:
        ValueError: the ranks' fields differ; on every rank.
        RuntimeError: a rank failed before the exchange, see `failing_together`; on every other.
    """
    sent, received = _exchange_headers(group, counts, [0, *(_coded(value) for value in fields)])
    failed = [rank for rank, header in enumerate(received) if header[0]]
    if failed:
        raise RuntimeError(f"expert_mesh: rank {failed[0]} failed before the exchange; its own error says why.")
    for place, (argument, of_it) in enumerate(FIELDS, 1):
        values = [header[place] for header in received]
        if len(set(values)) > 1:
            told = ", ".join(str(_decoded(value)) for value in values)
            raise ValueError(f"{argument}: the ranks of expert_mesh differ in {of_it}: {told}.")
    rows_sent, rows_received = ([header[1 + len(FIELDS) :] for header in headers] for headers in (sent, received))
    offsets = list(accumulate(chain.from_iterable(rows_sent), initial=0))
    parts = []
    for first, last in pairwise(accumulate(sizes, initial=0)):
        begins = range(0, len(offsets) - 1, sum(sizes))
        of_ranks = [sum(rows[first:last]) for rows in rows_received]
        exchange = Exchange(
            group, [slice(offsets[begin + first], offsets[begin + last]) for begin in begins],
            [slice(begin, end) for begin, end in pairwise(accumulate(of_ranks, initial=0))],
        )  # fmt: skip
        rows = torch.tensor(rows_received)[:, first:last].flatten()
        experts = torch.arange(last - first).repeat(len(rows_received)).repeat_interleave(rows)
        parts.append((exchange, experts.to(counts.device)))
    return parts


@contextmanager
def failing_together(group: dist.ProcessGroup, num_experts: int, device: torch.device) -> Iterator[None]:
    """What raises within, in front of `agree`, raises on this rank, and the others do not wait for it in vain."""
    try:
        yield
    except Exception:
        counts = torch.zeros(num_experts, dtype=torch.int64, device=device)
        _exchange_headers(group, counts, [1, *(0 for _ in FIELDS)])
        raise


def tell(group: dist.ProcessGroup, device: torch.device, *, failed: bool) -> InFlight:
    """Whether this rank failed after `agree`, to every rank: ends in (ranks,), uint8, 1 for those that did."""
    own = torch.full((1,), failed, dtype=torch.uint8, device=device)
    flags = own.new_empty(dist.get_world_size(group))
    return InFlight(flags, own, [dist.all_gather_into_tensor(flags, own, group=group, async_op=True)])


def _exchange_headers(
    group: dist.ProcessGroup, counts: Tensor, fields: Sequence[int]
) -> tuple[list[list[int]], list[list[int]]]:
    """The headers that this rank sent to each, and those that it received from each: fields, then rows an expert."""
    counts = counts.long().view(dist.get_world_size(group), -1)
    sent = torch.cat([counts.new_tensor(fields).expand(counts.shape[0], -1), counts], 1)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    both = torch.stack([sent, received]).tolist()
    return both[0], both[1]


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _coded(value: object) -> int:
    return 2 + _DTYPES.index(value) if isinstance(value, torch.dtype) else int(bool(value))


def _decoded(value: int) -> object:
    return _DTYPES[value - 2] if value >= 2 else bool(value)
