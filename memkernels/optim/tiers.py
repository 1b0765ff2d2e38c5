"""Optimizer states in host memory or on disk between steps."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from memkernels.offload.budget import Claim
from memkernels.offload.store import Stored, Tier, TieredStore
from memkernels.optim.checks import check_moving
from memkernels.optim.local import as_parameter, is_distributed, local_of
from memkernels.optim.optimizer import LowMemoryOptimizer

_ALIGNMENT = 64


def offload_states(
    optimizer: LowMemoryOptimizer,
    tier: Tier,
    *,
    max_host_bytes: int | None = None,
    path: str | os.PathLike[str] | None = None,
    min_bytes: int = 1 << 20,
    prefetch: int = 2,
) -> None:
    """Keeps an optimizer's states on a tier between steps, and within a step but for the parameter it is at.

        optimizer = memkernels.optim.AdamW(model.parameters(), lr=1e-4)
        memkernels.optim.offload_states(optimizer, "disk", path="/scratch")

    A step goes over the parameters one by one: the states of one are in memory, the next are read ahead, and the last
    are being written. It gives the same bits as in memory. With `step_in_backward` pass its `optimizer`, with a sharded
    optimizer the `local` one. `state_dict` has the states as tensors, all in memory, and so has a copy of the
    optimizer; `load_state_dict` moves what it loads. `optimizer.state` maps a parameter to a read-only mapping, which
    reads from the tier what is asked of it.

    Args:
        optimizer: of this package; it may have made steps.
        tier: "host": memory of the host; states of CPU parameters are there and stay. "disk": a file without a name.
            "auto": host memory to its limit, then disk. As `memkernels.offload.offload_activations` has them, with its
            `max_host_bytes` and `path`.
        min_bytes: of a parameter whose states take fewer bytes they stay; of a DTensor this rank's part counts.
        prefetch: of how many parameters states are read ahead.

    Raises:
        TypeError: optimizer is not of this package, or max_host_bytes no integer.
        ValueError: min_bytes, prefetch, or one of those of `TieredStore`, does not fit; or they are offloaded already.
        OSError: path does not exist or cannot be written. In a step: the disk is full, or a write failed and failed
            again. Then all parameters have made the step, which is not to be repeated; what could not be written stays
            in memory until a later step can write it. Or a read failed, or a checksum does not match: then parameters
            have made the step up to the one whose states it names the bytes of. `step_in_backward` stops at the
            parameter that fails.
        MemoryError: states of one parameter do not fit into max_host_bytes; as where the disk is full.
    """
    if not isinstance(optimizer, LowMemoryOptimizer):
        raise TypeError(f"optimizer: expected one of memkernels.optim, got {type(optimizer).__name__}.")
    check_moving(min_bytes, prefetch)
    if optimizer.tiers is not None:
        raise ValueError("optimizer: its states are offloaded already.")
    tiers = StateTiers(TieredStore(tier, max_host_bytes=max_host_bytes, path=path), min_bytes, prefetch)
    tiers.move_all(optimizer)
    optimizer.tiers = tiers
    optimizer.register_state_dict_post_hook(_with_tensors)


class TieredState(Mapping[str, Any]):
    """A parameter's state on a tier: what is asked of it is read from there, into memory of its own."""

    def __init__(self, store: TieredStore, state: Mapping[str, Any], flat: Tensor, param: Tensor):
        """`flat`, (n,) uint8, holds the state's tensors, each at a multiple of 64 bytes; `state` gives their kinds, and
        `param` how those are divided that are DTensors."""
        self._store, self._param = store, param
        self._rest = {key: value for key, value in state.items() if not _moves(value)}
        self._kinds = _kinds(state)
        self._divided = {key for key in self._kinds if is_distributed(state[key])}
        self._order = list(state)
        self.stored: Stored = store.put(flat)

    def __iter__(self) -> Iterator[str]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, key: object) -> bool:
        return key in self._order

    def __getitem__(self, key: str) -> Any:
        return self.load()[0][key]

    def load(self, then: Sequence[Stored] = ()) -> tuple[dict[str, Any], Tensor]:
        """The state as tensors, and the memory they are views of; `then` is read ahead."""
        flat = self._store.load(self.stored, then).clone()
        state = {**self._rest, **dict(_views(flat, self._kinds))}
        for key in self._divided:
            state[key] = as_parameter(state[key], self._param)
        return {key: state[key] for key in self._order}, flat

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy's are in memory."""
        return dict, (self.load()[0],)

    def items(self) -> Any:
        return self.load()[0].items()

    def values(self) -> Any:
        return self.load()[0].values()


class StateTiers:
    """Where an optimizer's states are between steps."""

    def __init__(self, store: TieredStore, min_bytes: int, prefetch: int):
        self.store = store
        self._min_bytes = min_bytes
        self._prefetch = prefetch
        self._claims: dict[Tensor, Claim] = {}  # of those in host memory as they are
        self._failure: OSError | MemoryError | None = None

    def move_all(self, optimizer: LowMemoryOptimizer) -> None:
        for param in optimizer.state:
            self._move(optimizer, param)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a step: raises at its end the first error for which states stayed in memory."""
        self._failure = None
        yield
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    @contextmanager
    def fetched(self, optimizer: LowMemoryOptimizer, param: Tensor, then: Sequence[Tensor]) -> Iterator[None]:
        """Within it the state of `param` is tensors in memory, which may change; those of `then` come next. Where they
        cannot move back afterwards they stay, and `step` tells."""
        state, flat = optimizer.state.get(param), None
        if isinstance(state, TieredState):
            states = map(optimizer.state.get, then)
            ahead = (other.stored for other in states if isinstance(other, TieredState))
            optimizer.state[param], flat = state.load(list(islice(ahead, self._prefetch)))
        del state  # so that its place on disk is free
        try:
            yield
        finally:
            try:
                self._move(optimizer, param, flat)
            except (OSError, MemoryError) as error:
                self._failure = self._failure or error

    def _move(self, optimizer: LowMemoryOptimizer, param: Tensor, flat: Tensor | None = None) -> None:
        state = optimizer.state.get(param)
        if state is None or isinstance(state, TieredState) or param in self._claims:
            return
        kinds = _kinds(state)
        offsets, nbytes = _layout(kinds)
        if nbytes < self._min_bytes:
            return
        device = param.device
        claim = self.store.claim_in_place(device, nbytes)
        if claim is not None:
            self._claims[param] = claim
            return
        if flat is None:
            flat = torch.zeros(nbytes, dtype=torch.uint8, device=device)
            for key in kinds:
                value = local_of(state[key])
                flat[offsets[key] : offsets[key] + value.nbytes] = value.contiguous().view(-1).view(torch.uint8)
        optimizer.state[param] = TieredState(self.store, state, flat, param)


def _moves(value: Any) -> bool:
    """Steps, which are counted on the CPU, stay."""
    return isinstance(value, Tensor) and value.dim() > 0 and local_of(value).numel() > 0


def _kinds(state: Mapping[str, Any]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Of what moves, as this rank has it."""
    return {key: (value.dtype, local_of(value).shape) for key, value in state.items() if _moves(value)}


def _layout(kinds: Mapping[str, tuple[torch.dtype, torch.Size]]) -> tuple[dict[str, int], int]:
    """Where each tensor begins, and the bytes of all."""
    offsets, end = {}, 0
    for key, (dtype, shape) in kinds.items():
        offsets[key] = end
        end += -(-shape.numel() * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


def _views(flat: Tensor, kinds: Mapping[str, tuple[torch.dtype, torch.Size]]) -> Iterator[tuple[str, Tensor]]:
    offsets, _ = _layout(kinds)
    for key, (dtype, shape) in kinds.items():
        part = flat[offsets[key] : offsets[key] + shape.numel() * dtype.itemsize]
        yield key, part.view(dtype).view(shape)


def _with_tensors(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A hook of `state_dict`: plain dicts of tensors, each with memory of its own, as they are saved."""
    states = dict(state_dict["state"])
    for index, state in states.items():
        if isinstance(state, TieredState):
            states[index] = {key: value.clone() if _moves(value) else value for key, value in state.items()}
    return state_dict | {"state": states}
