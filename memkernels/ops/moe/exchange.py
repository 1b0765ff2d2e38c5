"""Rows to the ranks that hold their experts and back: uneven all-to-all exchanges that run beside other work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

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
    """Rows on their way to this rank. What this rank sent lives until they are here."""

    def __init__(self, rows: Tensor, sent: Tensor, work: dist.Work):
        self.rows = rows
        self.sent: Tensor | None = sent
        self.work = work

    def wait(self) -> Tensor:
        self.work.wait()
        self.sent = None
        return self.rows


@dataclass(frozen=True)
class Exchange:
    """How many rows of one call go from this rank to the experts of each rank, and how many come from each.

    Args:
        group: the ranks.
        sent: rows to each rank, in the order of the grouped rows.
        received: rows from each rank.
    """

    group: dist.ProcessGroup
    sent: list[int]
    received: list[int]

    def to_experts(self, grouped: Tensor) -> InFlight:
        """Of grouped rows (R, d), those that belong to an expert; ends in those of this rank's experts."""
        rows = grouped.new_empty(sum(self.received), grouped.shape[1])
        sent = grouped[: sum(self.sent)].contiguous()
        return self._start(rows, sent, self.received, self.sent)

    def from_experts(self, rows: Tensor, num_rows: int) -> InFlight:
        """What the experts made of the received rows; ends in R = num_rows grouped rows, zero where without expert."""
        grouped, kept = rows.new_empty(num_rows, rows.shape[1]), sum(self.sent)
        grouped[kept:].zero_()
        flight = self._start(grouped[:kept], rows.contiguous(), self.sent, self.received)
        flight.rows = grouped
        return flight

    def _start(self, rows: Tensor, sent: Tensor, received_splits: list[int], sent_splits: list[int]) -> InFlight:
        # As bytes, since backends differ in the dtypes they take.
        into, of = rows.view(torch.uint8), sent.view(torch.uint8)
        work = dist.all_to_all_single(into, of, received_splits, sent_splits, group=self.group, async_op=True)
        return InFlight(rows, sent, work)


def agree(group: dist.ProcessGroup, counts: Tensor, fields: Sequence[object]) -> tuple[Exchange, Tensor]:
    """The exchange of a call: every rank tells every other its rows for each of the other's experts, and its `FIELDS`.

    The host waits here for the device, since it must know the sizes of what it receives.

    Args:
        group: the ranks; rank r holds experts r E / ranks to (r + 1) E / ranks.
        counts: (E,), int32 or int64: this rank's rows of each expert.
        fields: the values of `FIELDS`, each a torch.dtype or a bool.

    Returns:
        The exchange, and for each row that this rank will receive, which of its own experts it is for, (rows,), int64.

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
    rows = torch.tensor(rows_received)
    experts = torch.arange(rows.shape[1]).repeat(rows.shape[0]).repeat_interleave(rows.flatten())
    exchange = Exchange(group, [sum(row) for row in rows_sent], [sum(row) for row in rows_received])
    return exchange, experts.to(counts.device)


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
    return InFlight(flags, own, dist.all_gather_into_tensor(flags, own, group=group, async_op=True))


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
