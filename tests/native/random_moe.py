"""Random calls of the operators of the dispatch to experts, for a process with AddressSanitizer.

    random_moe.py SIMT_LIBRARY FIRST_CASE CASES SIMT_CASES

Cases of the native CPU operators, each of which follows from its number alone; the first of them also of CUDA's, which
the library has for CPU tensors, and which take longer: a thread of a block is a thread. What fits gives what the
reference gives, ids and rows that are out of range are refused, and any other change of an argument is refused or done
without an access outside of a tensor: each tensor is an allocation of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from random import Random
from typing import Any

import torch
from torch import Tensor

import memkernels.ops  # noqa: F401  defines the operators
from memkernels.ops.moe import reference

OPERATORS = ("moe_plan", "moe_dispatch", "moe_combine", "moe_combine_bwd")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST, MOST = -(2**31), 2**31 - 1


class Calls:
    """Calls of operators, right and wrong ones, by the random numbers of a case."""

    def __init__(self, operators: Any, number: int) -> None:
        self.operators = operators
        self.random = Random(number)
        torch.manual_seed(number)

    def right(self, name: str, *arguments: Any) -> Any:
        """The result. Then one of the arguments has another shape, dtype or value: whatever that gives."""
        result = getattr(self.operators, name)(*[_copy(argument) for argument in arguments])
        others = [_copy(argument) for argument in arguments]
        changed = self.random.randrange(len(others))
        others[changed] = self._other(others[changed])
        with contextlib.suppress(RuntimeError):
            getattr(self.operators, name)(*others)
        return result

    def wrong(self, name: str, *arguments: Any) -> None:
        try:
            getattr(self.operators, name)(*arguments)
        except RuntimeError:
            return
        raise AssertionError(f"{name} took {arguments}")

    def with_one_of(self, values: tuple[int, ...], tensor: Tensor) -> Tensor:
        """A copy with one of the values somewhere."""
        copy = tensor.clone()
        copy.view(-1)[self.random.randrange(copy.numel())] = self.random.choice(values)
        return copy

    def _other(self, argument: Any) -> Any:
        choice = self.random.choice
        if not isinstance(argument, Tensor):
            return choice([-1, 0, 1, 13, 2**62]) if type(argument) is int else argument
        dim = self.random.randrange(argument.dim())
        size = choice([0, 1, max(0, argument.shape[dim] - 1), argument.shape[dim] + 1])
        resized = argument.new_zeros(*argument.shape[:dim], size, *argument.shape[dim + 1 :])
        return choice(
            [resized, argument.reshape(-1).clone(), argument[None].clone(), argument.t().clone(), argument.short()]
        )


def _copy(argument: Any) -> Any:
    return argument.clone() if isinstance(argument, Tensor) else argument


def dispatch(calls: Calls) -> None:
    choice, below = calls.random.choice, calls.random.randrange
    tokens, choices, experts = choice([0, 1, 2, 9, below(40)]), 1 + below(11), 1 + below(11)
    capacity, size, dtype = choice([0, 1, below(9), tokens * choices, 2**62]), 1 + below(70), choice(DTYPES)
    ids = torch.randint(experts + 1, (tokens, choices), dtype=choice([torch.int32, torch.int64]))
    plan = calls.right("moe_plan", ids, experts, capacity)
    expected = reference.plan(ids, experts, min(capacity, ids.numel()))
    assert all(map(torch.equal, plan, expected)), (ids, experts, capacity)
    row_of_pair, pair_of_row, offsets, _ = plan
    rows = pair_of_row.shape[0]

    x, grouped, weights = (
        torch.randn(tokens, size).to(dtype),
        torch.randn(rows, size).to(dtype),
        torch.randn(tokens, choices),
    )
    assert torch.equal(
        calls.right("moe_dispatch", x, None, row_of_pair, offsets, rows),
        reference.dispatch(x, None, row_of_pair, pair_of_row),
    )
    calls.right("moe_dispatch", x, weights, row_of_pair, offsets, rows)
    calls.right("moe_combine", grouped, choice([None, weights]), row_of_pair)
    calls.right("moe_combine_bwd", x, grouped, weights, row_of_pair, offsets)

    end = calls.with_one_of((-1, rows + 1, LEAST, MOST), offsets[-1:])
    calls.wrong("moe_dispatch", x, None, row_of_pair, end, rows)
    calls.wrong("moe_combine_bwd", x, grouped, weights, row_of_pair, end)
    if ids.numel() == 0:
        return
    of_range = (-1, experts + 1, LEAST, MOST)
    of_range += () if ids.dtype == torch.int32 else (2**32, 2**32 + experts, -(2**40), -(2**63))
    calls.wrong("moe_plan", calls.with_one_of(of_range, ids), experts, capacity)
    outside = calls.with_one_of((-2, rows, LEAST, MOST), row_of_pair)
    calls.wrong("moe_dispatch", x, None, outside, offsets, rows)
    calls.wrong("moe_combine", grouped, weights, outside)
    calls.wrong("moe_combine_bwd", x, grouped, weights, outside, offsets)


def different_choices(calls: Calls) -> None:
    """Dispatch and combine where tokens differ in how many choices they have, and some choices are no token's."""
    choice, below = calls.random.choice, calls.random.randrange
    tokens, pairs, rows, size, dtype = below(20), below(60), below(40), 1 + below(70), choice(DTYPES)
    starts = sorted(below(pairs + 1) for _ in range(tokens))
    token_offsets = torch.tensor([0, *starts], dtype=torch.int32)
    # A row is one choice's, as a plan has it.
    every = torch.cat([torch.arange(rows), torch.full((pairs,), -1)])
    row_of_pair = every[torch.randperm(rows + pairs)[:pairs]].int()
    offsets, weights = torch.tensor([0, rows], dtype=torch.int32), torch.randn(pairs)
    x, grouped = torch.randn(tokens, size).to(dtype), torch.randn(rows, size).to(dtype)
    calls.right("moe_dispatch", x, choice([None, weights]), row_of_pair, offsets, rows, token_offsets)
    calls.right("moe_combine", grouped, choice([None, weights]), row_of_pair, token_offsets)
    _, dweights = calls.right("moe_combine_bwd", x, grouped, weights, row_of_pair, offsets, token_offsets)
    assert not dweights[token_offsets[-1] :].any()
    if tokens == 0:
        return
    outside = calls.with_one_of((-1, pairs + 1, LEAST, MOST), token_offsets)
    calls.wrong("moe_dispatch", x, None, row_of_pair, offsets, rows, outside)
    calls.wrong("moe_combine", grouped, weights, row_of_pair, outside)
    calls.wrong("moe_combine_bwd", x, grouped, weights, row_of_pair, offsets, outside)


def expert_activation(calls: Calls) -> None:
    choice, below = calls.random.choice, calls.random.randrange
    rows, size, gated, dtype = below(12), below(70), choice([False, True]), choice(DTYPES)
    dh, gate_up = torch.randn(rows, size).to(dtype), torch.randn(rows, size * (1 + gated)).to(dtype)
    arguments = gate_up, torch.randn(rows), gated, choice(["silu", "gelu", "gelu_tanh", "relu", "relu_squared"])
    h = calls.right("expert_activation_fwd", *arguments)
    assert h.shape == dh.shape
    *_, expected = calls.right("expert_activation_bwd", dh, *arguments)
    assert torch.equal(calls.right("expert_activation_bwd_", dh, *arguments), expected)


def load_simt(library: str) -> torch.library.Library:
    """Defines `memkernels_simt`, for as long as what it returns lives."""
    definitions = torch.library.Library("memkernels_simt", "DEF")
    for name in OPERATORS:
        schema = str(getattr(torch.ops.memkernels, name).default._schema)
        definitions.define(schema.removeprefix("memkernels::"))
    torch.ops.load_library(library)
    return definitions


def check_sanitizer() -> None:
    """That the bytes behind a tensor's last are out of bounds here, and those no others."""
    tensor = torch.zeros(7)
    is_poisoned = ctypes.CDLL(None).__asan_address_is_poisoned
    is_poisoned.argtypes = [ctypes.c_void_p]
    end = tensor.data_ptr() + tensor.nbytes
    assert is_poisoned(end) and not is_poisoned(end - 1)


def main(simt_library: str, first: str, count: str, simt_count: str) -> None:
    check_sanitizer()
    definitions = load_simt(simt_library)
    for number in range(int(first), int(first) + int(count)):
        dispatch(Calls(torch.ops.memkernels, number))
        different_choices(Calls(torch.ops.memkernels, number))
        expert_activation(Calls(torch.ops.memkernels, number))
    for number in range(int(first), int(first) + int(simt_count)):
        dispatch(Calls(torch.ops.memkernels_simt, number))
        different_choices(Calls(torch.ops.memkernels_simt, number))
    definitions._destroy()


if __name__ == "__main__":
    main(*sys.argv[1:])
