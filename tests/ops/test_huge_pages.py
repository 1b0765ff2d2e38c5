"""Large results of products on CPU ask the system for huge pages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from memkernels import _library, ops
from memkernels.ops.huge_pages import on_huge_pages

pytestmark = [
    pytest.mark.skipif(_library.cpu_library is None, reason=str(_library.cpu_missing)),
    pytest.mark.skipif(
        not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no transparent huge pages."
    ),
]
LARGE = 5 << 20  # elements of float32: beyond what malloc takes from memory that it has kept


def asks_for_huge_pages(tensor: torch.Tensor) -> bool:
    """Whether the system was asked for them over the middle of a tensor's memory: its mapping's flag "hg"."""
    middle, inside = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            begin, end = (int(word, 16) for word in first.split("-"))
            inside = begin <= middle < end
        elif inside and first == "VmFlags:":
            return "hg" in rest
    raise LookupError("the tensor's memory is in no mapping")


def test_large_tensors_ask_and_small_ones_do_not():
    assert not asks_for_huge_pages(torch.empty(LARGE * 2))
    assert asks_for_huge_pages(on_huge_pages(torch.empty(LARGE * 2)))


def test_gradients_of_expert_weights_ask():
    x, ids = torch.randn(4, 64), torch.tensor([[0], [2], [2], [1]])
    w_gate_up = torch.randn(3, LARGE // 64, 64, requires_grad=True)
    y, _ = ops.moe_dispatch(x, ids, 3)
    ops.grouped_matmul(y, w_gate_up, ops.moe_plan(ids, 3)).sum().backward()
    assert asks_for_huge_pages(w_gate_up.grad)


def test_gradient_of_the_head_asks():
    x, weight = torch.randn(2, 64), torch.randn(LARGE // 32, 64, requires_grad=True)
    ops.linear_cross_entropy(x, weight, torch.tensor([1, 2])).backward()
    assert asks_for_huge_pages(weight.grad)
