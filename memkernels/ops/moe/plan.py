"""Which row of the grouped rows each token's choice of expert has."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from memkernels._library import define, missing
from memkernels.ops.checks import check_integer
from memkernels.ops.moe import reference


def _plan_fake(expert_ids, num_experts, capacity):
    int32 = {"dtype": torch.int32}
    pairs = expert_ids.numel()
    return (
        expert_ids.new_empty(expert_ids.shape, **int32),
        expert_ids.new_empty(min(pairs, num_experts * capacity), **int32),
        expert_ids.new_empty(num_experts + 1, **int32),
        expert_ids.new_empty(num_experts + 1, **int32),
    )


define(
    "moe_plan(Tensor expert_ids, int num_experts, SymInt capacity)"
    " -> (Tensor row_of_pair, Tensor pair_of_row, Tensor offsets, Tensor counts)",
    _plan_fake,
)


class DispatchPlan(NamedTuple):
    """Where the choices of T tokens go: R grouped rows, in E groups, one an expert. All tensors are int32.

    R is T k, or E capacity where that is less, or P: rows from offsets[E] on belong to no expert.

    Args:
        row_of_pair: (T, k): the grouped row of a token's choice; -1 where it was dropped or goes nowhere. Or (P,),
            beside token_offsets.
        pair_of_row: (R,): the choice of a row, its index among all T k or P; -1 where the row belongs to no expert.
        offsets: (E + 1,): the rows of expert e are offsets[e] to offsets[e + 1].
        counts: (E + 1,): choices of each expert before capacity drops any; the last of those that go nowhere.
        token_offsets: (T + 1,), where tokens differ in how many choices they have: those of token t are
            token_offsets[t] to token_offsets[t + 1], and from token_offsets[T] on they are no token's. None: k each.
    """

    row_of_pair: Tensor
    pair_of_row: Tensor
    offsets: Tensor
    counts: Tensor
    token_offsets: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return num_tokens_of(self)

    @property
    def num_experts(self) -> int:
        return num_experts_of(self)

    @property
    def dropped(self) -> Tensor:
        """(E,): choices of each expert that capacity dropped."""
        return self.counts[:-1] - self.offsets.diff()

    @property
    def token_of_row(self) -> Tensor:
        """(R,): the token of a row; -1 where the row belongs to no expert."""
        return token_of_row(self)


# What layers call in place of the properties: torch.compile of torch 2.10 cannot read those of a NamedTuple.


def num_tokens_of(plan: DispatchPlan) -> int:
    return plan.row_of_pair.shape[0] if plan.token_offsets is None else plan.token_offsets.shape[0] - 1


def num_experts_of(plan: DispatchPlan) -> int:
    return plan.offsets.shape[0] - 1


def token_of_row(plan: DispatchPlan) -> Tensor:
    return reference.token_of_pair(plan.pair_of_row, plan.row_of_pair, plan.token_offsets).int()


def moe_plan(expert_ids: Tensor, num_experts: int, *, capacity: int | None = None) -> DispatchPlan:
    """The plan of a dispatch: a counting sort of the tokens' choices by expert.

    It is stable: the rows of an expert are in the order of the tokens, and of choices of one token in theirs. With
    `capacity` each expert takes its first `capacity` choices in that order, and the rest is dropped (Switch
    Transformers, arXiv 2101.03961, section 2.2, and GShard, arXiv 2006.16668, drop in the order of tokens too).

    Args:
        expert_ids: (T, k), int64 or int32, 0 to num_experts; num_experts itself means nowhere. Of a token's at most
            num_experts go to an expert: k may be larger where these are the part of the experts that is here, and the
            other choices go nowhere.
        num_experts: E, at least 1.
        capacity: the most rows an expert takes, at least 1; None: all of them (dropless).

    Raises:
        TypeError: a dtype other than those above; a number of experts or capacity that is no integer.
        ValueError: a shape, number of experts or capacity that does not fit.
        RuntimeError: an id out of range, or more of a token's choices than there are experts; on a GPU a device-side
            assertion.
    """
    _check_ids("expert_ids", expert_ids)
    if expert_ids.dim() != 2 or expert_ids.shape[1] == 0:
        raise ValueError(f"expert_ids: expected shape (T, k) with k at least 1, got {tuple(expert_ids.shape)}.")
    check_integer("num_experts", num_experts, "at least 1")
    if capacity is not None:
        check_integer("capacity", capacity, "at least 1 or None")
    pairs = expert_ids.numel()
    if expert_ids.shape[1] > num_experts:
        torch._assert_async(
            ((expert_ids < num_experts).sum(1) <= num_experts).all(),
            f"expert_ids: expected at most num_experts = {num_experts} choices of a token that go to an expert, got"
            f" more of k = {expert_ids.shape[1]}; the others are to be {num_experts}: nowhere.",
        )
    rows = pairs if capacity is None else min(capacity, pairs)
    compute = reference.plan if missing("moe_plan", expert_ids.device.type) else torch.ops.memkernels.moe_plan
    return DispatchPlan(*compute(expert_ids, num_experts, rows))


def _check_ids(name: str, ids: Tensor) -> None:
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{name}: expected int64 or int32, got {got}.")


def expert_choice_plan(token_ids: Tensor, num_tokens: int) -> tuple[DispatchPlan, Tensor]:
    """The plan of experts that choose tokens: P = E C choices and rows, whatever T and E are.

    A token's choices are in the order of the experts, and the rows of an expert in that of its token_ids.

    Args:
        token_ids: (E, C), int64 or int32, 0 to num_tokens; num_tokens itself means nobody.
        num_tokens: T.

    Returns:
        The plan, with `token_offsets`, and of each of its P choices which of token_ids it is, e C + c, (P,), int64.

    Raises:
        TypeError: a dtype other than those above; num_tokens is no integer.
        ValueError: a shape that does not fit; num_tokens is negative.
        RuntimeError: an id out of range; on a GPU a device-side assertion.
    """
    _check_ids("token_ids", token_ids)
    check_integer("num_tokens", num_tokens, "an integer from 0 up", least=0)
    if token_ids.dim() != 2 or token_ids.shape[0] == 0 or token_ids.numel() > torch.iinfo(torch.int32).max:
        raise ValueError(
            f"token_ids: expected shape (E, C) of at most 2^31 - 1 elements, got {tuple(token_ids.shape)}."
        )
    torch._assert_async(
        ((token_ids >= 0) & (token_ids <= num_tokens)).all(),
        "token_ids: expected 0 to num_tokens (num_tokens: nobody), got an id out of range.",
    )
    pairs = token_ids.numel()
    taken = token_ids < num_tokens
    counts = taken.sum(1)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    row = torch.where(taken.flatten(), taken.flatten().cumsum(0) - 1, -1)
    token_of_pair, choice_of_pair = token_ids.flatten().sort(stable=True)
    row_of_pair = row[choice_of_pair]
    # One place more, for those that have no row.
    pair_of_row = row.new_full((pairs + 1,), -1)
    pair_of_row.scatter_(0, row_of_pair.remainder(pairs + 1), torch.arange(pairs, device=row.device))
    tokens = torch.arange(num_tokens + 1, dtype=token_ids.dtype, device=row.device)
    token_offsets = torch.searchsorted(token_of_pair, tokens, out_int32=True)
    counts = torch.cat([counts, pairs - offsets[-1:]])
    rows = row_of_pair.int(), pair_of_row[:-1].int()
    return DispatchPlan(*rows, offsets.int(), counts.int(), token_offsets), choice_of_pair
