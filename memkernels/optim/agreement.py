"""What the ranks say to each other besides tensors: that they agree, and what went wrong on one of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

_NOBODY_SENDS = 2**31 - 1  # a tag
_OF_MEMORY = "memory ran out on this rank within an exchange with the others."
_OF_OTHERS = (
    "an exchange with the other ranks failed: one of them has ended, has run out of memory within it, or did not answer"
    " within the process group's timeout."
)


class RankFailure(RuntimeError):
    """An exchange with the other ranks failed: one of them has ended, has run out of memory within it, or did not
    answer in the group's time."""


@contextmanager
def exchanging(group: dist.ProcessGroup | None = None, *, begun: bool = False) -> Iterator[None]:
    """Has exchanges of a group that fail within it raise RankFailure, here and on the ranks that wait for this one.

    Args:
        begun: whether others may have this rank's half already, so that memory that runs out fails the exchange too.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        of_memory = is_out_of_memory(error)
        if of_memory and not begun:
            raise
        if group is not None:
            leave(group)
        what = _OF_MEMORY if of_memory else _OF_OTHERS
        raise RankFailure(f"{what} This rank may hold half of a step: go on from the last checkpoint.") from error


def leave(group: dist.ProcessGroup) -> None:
    """Has what the others exchange with this rank over gloo fail at once, and all that comes after it.

    gloo closes a rank's connections where it has waited in vain; what it waits for here, nobody sends. From a rank that
    has left already it does not wait.
    """
    if backends_of(group).get("cpu") != "gloo":
        return
    own = dist.get_rank(group)
    for rank in (rank for rank in range(dist.get_world_size(group)) if rank != own):
        with suppress(RuntimeError):
            group.recv([torch.empty(1)], rank, _NOBODY_SENDS).wait(timedelta(milliseconds=1))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; torch's allocator on CPU raises a RuntimeError, which only its words tell from others."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def is_left_out(group: Any) -> bool:
    """Whether it is what `torch.distributed.new_group` gives a rank that is not in the group."""
    return group is dist.GroupMember.NON_GROUP_MEMBER


def check_member(group: dist.ProcessGroup) -> None:
    """Raises ValueError where this rank is not in the group."""
    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        raise ValueError("process_group: expected one that this rank is in.")


class Exchange(NamedTuple):
    """A collective that was started."""

    work: dist.Work
    group: dist.ProcessGroup


def start(collective: Callable[..., dist.Work], *tensors: Any, group: dist.ProcessGroup, **options: Any) -> Exchange:
    """Starts a collective of torch.distributed.

    Raises:
        RankFailure: it fails at once.
    """
    with exchanging(group):
        return Exchange(collective(*tensors, async_op=True, group=group, **options), group)


def wait_for(exchange: Exchange) -> None:
    """Waits for what was started.

    Raises:
        RankFailure: it failed, on this rank for memory or on another for anything.
    """
    with exchanging(exchange.group, begun=True):
        exchange.work.wait()


def backends_of(group: dist.ProcessGroup) -> dict[str, str]:
    """A group's backends by type of device. That of a group that was made without naming any has no other name."""
    return dict(pair.split(":", 1) for pair in dist.get_backend_config(group).split(","))


def device_of(group: dist.ProcessGroup) -> torch.device:
    """Where a group takes small tensors from."""
    return torch.device("cpu" if "cpu" in backends_of(group) else "cuda")


def check_agreement(group: dist.ProcessGroup, lines: Sequence[str], error: Exception | None) -> None:
    """Every rank calls it: none has an error, and all say the same.

    Args:
        lines: what must be the same on every rank, named.
        error: what this rank met while it made them.

    Raises:
        the rank's own error; on the others ValueError, which names the rank and its error, or the first line that
        differs.
    """
    failure = None if error is None else f"{type(error).__name__}: {error}"
    own = json.dumps([failure, list(lines)]).encode()
    digests = _gather(group, hashlib.sha256(own).digest())
    if error is None and len(set(digests)) == 1:
        return
    said = [json.loads(text) for text in exchange_texts(group, own)]
    if error is not None:
        raise error
    for rank, (theirs, _) in enumerate(said):
        if theirs is not None:
            raise ValueError(f"rank {rank}: {theirs}")
    everyone = [lines for _, lines in said]
    for i in range(max(map(len, everyone))):
        of_ranks = [theirs[i] if i < len(theirs) else "nothing" for theirs in everyone]
        if len(set(of_ranks)) > 1:
            differ = "; ".join(f"rank {rank} has {line}" for rank, line in enumerate(of_ranks))
            raise ValueError(f"the ranks differ: {differ}.")


def on_all(group: dist.ProcessGroup | None, function: Callable[[], Any], lines: Sequence[str] = ()) -> Any:
    """function() on every rank; where it raises on one, or `lines` differ, every rank raises."""
    error, result = None, None
    try:
        result = function()
    except Exception as caught:
        error = caught
    if group is None and error is not None:
        raise error
    if group is not None:
        check_agreement(group, lines, error)
    return result


def exchange_texts(group: dist.ProcessGroup, own: bytes) -> list[bytes]:
    """Every rank's text, of any length."""
    lengths = [int.from_bytes(part, "little") for part in _gather(group, len(own).to_bytes(8, "little"))]
    texts = _gather(group, own.ljust(max(lengths)))
    return [text[:length] for text, length in zip(texts, lengths, strict=True)]


def _gather(group: dist.ProcessGroup, own: bytes) -> list[bytes]:
    """As many bytes of every rank."""
    device = device_of(group)
    data = torch.frombuffer(bytearray(own), dtype=torch.uint8).to(device)
    everyone = [torch.empty_like(data) for _ in range(dist.get_world_size(group))]
    wait_for(start(dist.all_gather, everyone, data, group=group))
    return [bytes(part.tolist()) for part in everyone]
