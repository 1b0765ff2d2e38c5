"""Linear cross-entropy's row kernels in CUDA C++ as operators, on CPU tensors."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch

from memkernels import ops
from memkernels.ops.linear_cross_entropy import reference, tiles
from memkernels.testing import check_op, random_tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALL_OPTIONS = {"softcap": 3.0, "label_smoothing": 0.1, "z_loss": 1e-2}

pytestmark = pytest.mark.xdist_group("simt_operators")  # one library, compiled once


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["plain", "all-options"])
def test_linear_cross_entropy_matches_reference(calls, dtype, options):
    inputs = {
        "x": random_tensor(3, 7, 60, dtype=dtype, seed=1),
        "weight": random_tensor(131, 60, dtype=dtype, seed=2, scale=60**-0.5),
        "target": (torch.arange(21) * 50 % 131).view(3, 7),
    }
    inputs["target"][1, 2:5] = -100
    with mock.patch.object(tiles, "tile_columns", lambda x, rows, vocab_size: 77):
        check_op(ops.linear_cross_entropy, reference.linear_cross_entropy, inputs, reduction="none", **options)
    assert set(calls) == {"cross_entropy_stats", "cross_entropy_grad_"}


def row_state(rows):
    return [torch.full((rows,), -math.inf), *(torch.zeros(rows) for _ in range(3))]


def test_rows_of_a_wider_tensor(simt):
    wide = random_tensor(6, 50, dtype=torch.float32, seed=1).detach()
    tile, target = wide[:, 7:40], torch.tensor([0, 32, -100, 40, 5, 17])
    got, exact = row_state(6), [state.double() for state in row_state(6)]
    simt.cross_entropy_stats(tile, target, 0, 60, -100, 0.0, *got)
    reference.cross_entropy_stats(tile.double(), target, 0, 60, -100, 0.0, *exact)
    for ours, theirs in zip(got, exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-6)

    grad_loss, before = torch.linspace(-1, 2, 6), wide.clone()
    expected = before.double()
    reference.cross_entropy_grad_(
        expected[:, 7:40], target, 0, 60, *exact[:2], grad_loss.double(), -100, 0.0, 0.1, 0.01
    )
    simt.cross_entropy_grad_(tile, target, 0, 60, *got[:2], grad_loss, -100, 0.0, 0.1, 0.01)
    torch.testing.assert_close(wide.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(wide[:, :7], before[:, :7]) and torch.equal(wide[:, 40:], before[:, 40:])


def test_bad_arguments_are_named(simt):
    logits, target = torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="logits: expected columns of stride 1, got stride 4"):
        simt.cross_entropy_stats(torch.zeros(8, 4).t(), target, 0, 8, -100, 0.0, *row_state(4))
    with pytest.raises(RuntimeError, match=r"logits: expected .*, got 1 dimensions"):
        simt.cross_entropy_stats(torch.zeros(4), target, 0, 8, -100, 0.0, *row_state(4))
    with pytest.raises(RuntimeError, match="row_max: expected 4 contiguous elements, one per row of logits, got 3"):
        simt.cross_entropy_stats(logits, target, 0, 8, -100, 0.0, *row_state(3))
    with pytest.raises(RuntimeError, match="row_max: expected 4 contiguous elements"):
        simt.cross_entropy_grad_(
            logits, target, 0, 8, torch.zeros(8)[::2], torch.ones(4), torch.zeros(4), -100, 0.0, 0.0, 0.0
        )
    with pytest.raises(RuntimeError, match="expected float32, bfloat16 or float16"):
        simt.cross_entropy_stats(logits.double(), target, 0, 8, -100, 0.0, *row_state(4))
    with pytest.raises(RuntimeError, match="target out of range"):
        simt.cross_entropy_stats(logits, target + 8, 0, 8, -100, 0.0, *row_state(4))
