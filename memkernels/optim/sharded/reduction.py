"""Sums of the ranks' gradients, each rank's own range, on their way while backward goes on."""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from memkernels.offload.store import TieredStore
from memkernels.optim.agreement import Exchange, RankFailure, device_of, start, wait_for
from memkernels.optim.buckets import EXCHANGES_AT_ONCE
from memkernels.optim.sharded.gather import Gatherer
from memkernels.optim.sharded.gradients import Buffers, Gradients
from memkernels.optim.sharded.layout import Bucket
from memkernels.optim.sharded.sums_on_tier import SumsOnTier


class _InFlight(NamedTuple):
    bucket: int
    sent: Tensor
    received: Tensor
    exchange: Exchange


class Kept(NamedTuple):
    """Gradients as they were: which parameters had one on this rank, and copies of this rank's sums."""

    present: set[int]
    sums: Any


class GradientHook:
    """What autograd calls with a parameter whose gradient is complete; `micro_batch` knows such a parameter by it.

    It keeps neither the reducer nor the parameter alive: Python's collector does not see what autograd's hooks hold.
    """

    def __init__(self, reducer: Reducer, bucket: int, piece: int) -> None:
        self._reducer, self._bucket, self._piece = weakref.ref(reducer), bucket, piece

    @property
    def exchanging(self) -> bool:
        reducer = self._reducer()
        return reducer is not None and reducer.exchanging

    def is_of(self, reducer: Reducer) -> bool:
        return self._reducer() is reducer

    def __call__(self, parameter: Tensor) -> None:
        reducer = self._reducer()
        if reducer is not None:  # otherwise its optimizer is gone
            reducer.on_gradient(self._bucket, self._piece)


class Reducer:
    """Hooks on the parameters that exchange a bucket once all of its gradients are complete.

    A rank sends each other one that one's range, and adds up what it receives in the order of the ranks: as many bytes
    as a ring's reduce-scatter, and over gloo half of its time. The buckets go in one order on every rank, whatever
    order backward has there; those that wait for a gradient that does not come go when backward ends, with zeros.
    """

    def __init__(
        self, buckets: Sequence[Bucket], gradients: Gradients, buffers: Buffers, gatherer: Gatherer,
        group: dist.ProcessGroup,
    ) -> None:  # fmt: skip
        self.gradients = gradients
        # The parameters with a gradient on this rank, by place in the optimizer.
        self.present: set[int] = set()
        self._buckets, self._buffers, self._gatherer, self._group = buckets, buffers, gatherer, group
        self._ranks = dist.get_world_size(group)
        # Whether backward exchanges, and how many did.
        self.exchanging, self.backwards = True, 0
        self._listen: Callable[[Exception | None], None] | None = None
        self._in_flight: deque[_InFlight] = deque()
        # What is said once an exchange has failed: half of it may have been taken.
        self._lost: str | None = None
        # Whether there may be gradients that were not sent, sums of a backward since `finish`, and sums at all.
        self._unsent, self._new, self._summed = True, False, False
        self._begin()
        for i, bucket in enumerate(buckets):
            for j, piece in enumerate(bucket.pieces):
                piece.parameter.register_post_accumulate_grad_hook(GradientHook(self, i, j))

    @contextmanager
    def no_exchange(self) -> Iterator[None]:
        """Within it backward adds to this rank's gradients alone."""
        before, self.exchanging, self._unsent = self.exchanging, False, True
        try:
            yield
        finally:
            self.exchanging = before

    @contextmanager
    def listening(self, listen: Callable[[Exception | None], None]) -> Iterator[None]:
        """Within it `listen(None)` goes before each exchange of a bucket that has memory of its own, after that is made
        on every rank; where it raises, this backward exchanges nothing more."""
        self._listen = listen
        try:
            yield
        finally:
            self._listen = None

    @torch.no_grad()
    def finish(self) -> bool:
        """Until every gradient is in the sums: exchanges what was not, and waits. Returns whether they are new."""
        self._check()
        if self._unsent:
            self.end_backward()
        new, self._new = self._new, False
        return new

    def clear(self) -> None:
        """No gradients; of a backward that failed what is on its way is dropped when it has come."""
        if self._is_clear:
            return
        self._drop()
        self.gradients.clear(only_sums=not self._unsent and not self._in_backward)
        self._begin()
        self._unsent, self._summed = True, False
        self.present.clear()

    def with_sums_on(self, store: TieredStore, min_bytes: int, prefetch: int) -> SumsOnTier:
        """Gradients whose sums are on a tier, to take the place of those that there are."""
        if not self._is_clear:
            raise RuntimeError("optimizer: expected no gradients: call it before a backward, or after a step.")
        device = self._buckets[0].pieces[0].parameter.device if self._buckets else torch.device("cpu")
        wire = self.gradients.wire
        return SumsOnTier(self._buckets, self._buffers, wire, device, store, min_bytes, prefetch)

    @property
    def _is_clear(self) -> bool:
        return not self._summed and not self._in_backward and not self.present

    def has_unsent(self) -> bool:
        """Whether there are gradients on any rank that are not in the sums; every rank calls it."""
        left = self._in_backward or (self._unsent and bool(self.present))
        unsent = torch.tensor(float(left), device=device_of(self._group))
        wait_for(start(dist.all_reduce, unsent, group=self._group))
        return unsent.item() > 0

    def flush(self) -> None:
        """Exchanges what is not in the sums, within `listening`."""
        try:
            self.end_backward()
        except Exception as error:
            self.abandon(error)
            raise

    @torch.no_grad()
    def reserve(self) -> None:
        """Takes the memory that `abandon` needs, which stays."""
        if self._ranks == 1:
            return
        wire = self.gradients.wire
        one_of_each = {wire[i]: i for i, bucket in enumerate(self._buckets) if self._buffers.stays(bucket.size)}
        for i in one_of_each.values():
            received = self._buffers.borrow(self._buckets[i].size, wire[i])
            sent = self.gradients.filler(i)
            self._give_back(i, sent, received)

    @torch.no_grad()
    def keep(self) -> Kept | None:
        """What `restore` takes, where every gradient is in the sums; None for none, on every rank or on no one."""
        return Kept(set(self.present), self.gradients.copies()) if self._summed else None

    @torch.no_grad()
    def restore(self, kept: Kept | None) -> None:
        """Makes the gradients those that `keep` gave."""
        self.clear()
        if kept is not None:
            self.gradients.put_back(kept.sums)
            self.present |= kept.present
            self._unsent, self._summed = False, True

    def _begin(self) -> None:
        """Nothing of a backward's gradients was sent."""
        self._next, self._in_backward, self._heard = 0, False, False
        self._ending: Callable[[], object] = lambda: None
        self._missing = [{piece.place for piece in bucket.pieces} for bucket in self._buckets]

    @torch.no_grad()
    def on_gradient(self, i: int, j: int) -> None:
        """The gradient of piece j of bucket i is complete."""
        piece = self._buckets[i].pieces[j]
        if self._gatherer.is_coming(i):
            raise RuntimeError(
                f"{piece.name} was used before its new value had come, as no module was called that waits for it:"
                " call wait() of the optimizer before such a forward."
            )
        self.present.add(piece.place)
        if not self.exchanging:
            return
        self._check()
        if i < self._next:
            raise RuntimeError(
                f"{piece.name} got a gradient twice in one backward: checkpoint activations with use_reentrant=False."
            )
        if not self._in_backward:
            self._in_backward = True
            ending = functools.partial(self.end_backward)
            self._ending = weakref.ref(ending)
            torch.autograd.Variable._execution_engine.queue_callback(ending)
        self.gradients.take(i, piece)
        self._missing[i].discard(piece.place)
        while self._next < len(self._buckets) and not self._missing[self._next]:
            self._send()

    def _check(self) -> None:
        """Raises where an exchange has failed, or a backward: autograd has dropped what it was to call at its end."""
        if self._lost is not None:
            raise RankFailure(self._lost)
        if self._in_backward and self._ending() is None:
            raise RuntimeError(
                "a backward since the last step failed, and left a part of its gradients: call zero_grad() of the"
                " optimizer."
            )

    @torch.no_grad()
    def end_backward(self) -> None:
        """Sends what is left, and waits: the next backward may add to what was sent.

        A rank that has no backward calls it too: the others wait for its part.
        """
        if self._lost is not None:
            raise RankFailure(self._lost)
        while self._next < len(self._buckets):
            for piece in self._buckets[self._next].pieces:
                if piece.place in self._missing[self._next]:
                    self.gradients.take(self._next, piece)
            self._send()
        while self._in_flight:
            self._receive()
        self._begin()
        self._unsent = False
        self.backwards += 1

    @torch.no_grad()
    def abandon(self, error: Exception) -> None:
        """Drops all gradients after an error on this rank, within `listening`, and takes part in what is left of the
        others' backward, in memory that `reserve` made. Where they listen, it raises what `listen(error)` does."""
        if self._lost is not None:
            raise RankFailure(self._lost)
        self._in_backward = True
        self._drop()
        self.gradients.clear(only_sums=False)
        while self._ranks > 1 and self._next < len(self._buckets) and not self._heard:
            i, bucket = self._next, self._buckets[self._next]
            if not self._buffers.stays(bucket.size):
                self._hear(error)
            received = self._buffers.borrow(bucket.size, self.gradients.wire[i])
            self._exchange(i, self.gradients.filler(i), received)
            self._drop()
            self._next += 1

    def _send(self) -> None:
        """Sends the next bucket. Memory may run out at `borrow`: nothing has changed then."""
        i = self._next
        if self._ranks == 1:
            sent = self.gradients.to_send(i)
            self.gradients.store(i, sent.view(1, -1))
            self.gradients.sent(i, sent)
        else:
            if len(self._in_flight) == EXCHANGES_AT_ONCE:
                self._receive()
            size = self._buckets[i].size
            received = self._buffers.borrow(size, self.gradients.wire[i])
            try:
                sent = self.gradients.to_send(i)
            except BaseException:
                self._buffers.give_back(received)
                raise
            if not self._buffers.stays(size):
                self._hear(None)
            self._exchange(i, sent, received)
        self._next += 1
        self._new = self._summed = True

    def _hear(self, error: Exception | None) -> None:
        if self._listen is not None:
            self._heard = True
            self._listen(error)
            self._heard = False

    def _exchange(self, i: int, sent: Tensor, received: Tensor) -> None:
        """Starts to exchange bucket i."""
        try:
            with self._noting():
                exchange = start(dist.all_to_all_single, received, sent, group=self._group)
        except BaseException:
            self._give_back(i, sent, received)
            raise
        self._in_flight.append(_InFlight(i, sent, received, exchange))

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except RankFailure as failure:
            self._lost = str(failure)
            raise

    def _receive(self, store: bool = True) -> None:
        """Adds up what the oldest exchange brings, or with store=False drops it."""
        i, sent, received, exchange = self._in_flight.popleft()
        with self._noting():
            wait_for(exchange)
        try:
            if store:
                self.gradients.store(i, received.view(self._ranks, -1))
        finally:
            self._give_back(i, sent, received)

    def _drop(self) -> None:
        """Waits for what is on its way, and drops it."""
        while self._in_flight:
            self._receive(store=False)

    def _give_back(self, i: int, sent: Tensor, received: Tensor) -> None:
        self.gradients.sent(i, sent)
        self._buffers.give_back(received)
