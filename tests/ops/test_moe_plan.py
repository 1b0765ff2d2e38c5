"""Plans of a mixture of experts: of tokens that choose experts, and of experts that choose tokens."""

from __future__ import annotations

import pytest
import torch
from experts import random_ids
from hypothesis import given, settings
from hypothesis import strategies as st

from memkernels import ops
from memkernels.ops.moe import reference
from memkernels.testing import implementations, poisoned_memory

on_every_implementation = pytest.mark.parametrize("implementation", implementations("moe_dispatch"), ids=str)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 40), choices=st.integers(1, 4), experts=st.integers(4, 9),
    capacity=st.integers(1, 30) | st.none(), nowhere=st.booleans(), dtype=st.sampled_from([torch.int64, torch.int32]),
)  # fmt: skip
def test_a_plan_gives_each_choice_a_row_of_its_expert_in_the_order_of_tokens(
    tokens, choices, experts, capacity, nowhere, dtype
):
    ids = random_ids(tokens, choices, experts, nowhere=nowhere, seed=tokens).to(dtype)
    with poisoned_memory():
        plan = ops.moe_plan(ids, experts, capacity=capacity)
    expected = [[] for _ in range(experts)]
    counts = [0] * (experts + 1)
    for pair, expert in enumerate(ids.flatten().tolist()):
        counts[expert] += 1
        if expert < experts and (capacity is None or len(expected[expert]) < capacity):
            expected[expert].append(pair)
    pairs = [pair for group in expected for pair in group]
    rows = plan.pair_of_row.shape[0]
    assert rows == min(ids.numel(), experts * (capacity or ids.numel()))
    assert plan.pair_of_row.tolist() == pairs + [-1] * (rows - len(pairs))
    assert plan.offsets.diff().tolist() == [len(group) for group in expected]
    assert plan.counts.tolist() == counts
    assert plan.dropped.tolist() == [count - len(group) for count, group in zip(counts, expected, strict=False)]
    row_of_pair = plan.row_of_pair.flatten().tolist()
    assert row_of_pair == [pairs.index(pair) if pair in pairs else -1 for pair in range(ids.numel())]
    assert plan.token_offsets is None
    for ours, theirs in zip(plan[:4], reference.plan(ids, experts, capacity or max(ids.numel(), 1)), strict=True):
        if rows == theirs.shape[0] or theirs.dim() == 2:
            assert torch.equal(ours, theirs)


@on_every_implementation
def test_a_plan_of_many_tokens_is_that_of_the_reference(implementation):
    """More pairs than one task sorts, and an expert without any."""
    with implementation.active() as device:
        ids = random_ids(20_000, 2, 63).to(device)
        ids[ids == 17] = 64
        for ours, theirs in zip(ops.moe_plan(ids, 64, capacity=500)[:4], reference.plan(ids, 64, 500), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"expert_ids": torch.zeros(4, 2)}, TypeError, "expert_ids: expected int64 or int32, got torch.float32"),
        ({"expert_ids": torch.zeros(4, dtype=torch.int64)}, ValueError, r"expert_ids: expected shape \(T, k\)"),
        ({"expert_ids": torch.zeros(4, 0, dtype=torch.int64)}, ValueError, r"expert_ids: expected shape \(T, k\)"),
        ({"expert_ids": torch.full((4, 2), 6)}, RuntimeError, "expert_ids: expected 0 to 5"),
        ({"expert_ids": torch.full((4, 2), -1)}, RuntimeError, "expert_ids: expected 0 to 5"),
        ({"expert_ids": torch.ones(4, 6).long()}, RuntimeError, "expert_ids: .* at most num_experts = 5 choices"),
        ({"num_experts": 1}, RuntimeError, "expert_ids: .* at most num_experts = 1 choices of a token .* of k = 2"),
        ({"num_experts": 0}, ValueError, "num_experts: expected at least 1, got 0"),
        ({"capacity": 0}, ValueError, "capacity: expected at least 1 or None, got 0"),
    ],
)  # fmt: skip
def test_a_plan_of_bad_input_names_the_argument(change, error, message):
    arguments = {"expert_ids": torch.zeros(4, 2, dtype=torch.int64), "num_experts": 5, "capacity": None} | change
    with pytest.raises(error, match=message):
        ops.moe_plan(arguments["expert_ids"], arguments["num_experts"], capacity=arguments["capacity"])


CHOSEN = torch.tensor([[5, 1, 3, 6], [6, 3, 0, 6], [3, 6, 6, 6], [6, 6, 6, 6], [0, 1, 2, 3]])  # of 6 tokens, 6: nobody


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("chosen", [CHOSEN, CHOSEN[:, :0], CHOSEN[3:4]], ids=["some", "no place", "nobody"])
def test_experts_that_choose_have_the_rows_of_their_tokens(chosen, dtype):
    with poisoned_memory():
        plan, choice_of_pair = ops.expert_choice_plan(chosen.to(dtype), 6)
    chosen = chosen.tolist()
    rows = [(token, expert) for expert, of_expert in enumerate(chosen) for token in of_expert if token < 6]
    pairs = sorted(rows)  # by token, then by expert
    nobody = [-1] * (sum(map(len, chosen)) - len(rows))
    assert plan.row_of_pair.tolist() == [rows.index(pair) for pair in pairs] + nobody
    assert plan.pair_of_row.tolist() == [pairs.index(row) for row in rows] + nobody
    assert plan.token_of_row.tolist() == [token for token, _ in rows] + nobody
    assert plan.token_offsets.tolist() == [sum(token < t for token, _ in rows) for t in range(7)]
    counts = [sum(expert == e for _, expert in rows) for e in range(len(chosen))]
    assert plan.counts.tolist() == [*counts, len(nobody)] and plan.offsets.diff().tolist() == counts
    assert not plan.dropped.any() and (plan.num_tokens, plan.num_experts) == (6, len(chosen))
    assert all(tensor.dtype == torch.int32 for tensor in plan) and choice_of_pair.dtype == torch.int64
    flat = [(token, expert) for expert, of_expert in enumerate(chosen) for token in of_expert]
    assert [flat[choice] for choice in choice_of_pair.tolist()] == sorted(flat)


@pytest.mark.parametrize(
    ("token_ids", "error", "message"),
    [
        (CHOSEN.float(), TypeError, "token_ids: expected int64 or int32, got torch.float32"),
        (CHOSEN[0], ValueError, r"token_ids: expected shape \(E, C\)"),
        (CHOSEN[:0], ValueError, r"token_ids: expected shape \(E, C\)"),
        (CHOSEN + 1, RuntimeError, "token_ids: expected 0 to num_tokens"),
        (CHOSEN - 1, RuntimeError, "token_ids: expected 0 to num_tokens"),
    ],
)
def test_a_plan_of_experts_of_bad_input_names_the_argument(token_ids, error, message):
    with pytest.raises(error, match=message):
        ops.expert_choice_plan(token_ids, 6)
