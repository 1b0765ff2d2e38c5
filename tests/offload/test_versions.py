"""What memory holds at the time it is saved comes back, whoever shares it and whatever is written to it later."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from offloaded_model import assert_same_bits, disk
from torch import nn

from memkernels.offload import TieredStore

pytest.importorskip("memkernels._runtime", reason="built without pybind11 or Python's headers")

MB = 1 << 20


@pytest.mark.parametrize("min_bytes", [1, MB], ids=["moved", "stays"])
def test_versions_are_told_apart(tmp_path, min_bytes):
    """What was saved after a change comes back as it was then; what was saved before raises, as without offload."""
    x, later = torch.randn(2, 64, 64).unbind()
    x, later = x.requires_grad_(), later.requires_grad_()
    with disk(tmp_path, min_bytes=min_bytes):
        h = x * 1
        first = h * h.detach()
        h.detach().mul_(2)
        second = later * h.detach()
    second.sum().backward()
    assert torch.equal(later.grad, 2 * x.detach())
    with pytest.raises(
        RuntimeError, match=r"inplace operation: .* shape \(64, 64\) is at version 1; expected version 0"
    ):
        first.sum().backward()


@pytest.mark.parametrize("cell", [nn.GRUCell, nn.LSTMCell])
def test_parts_that_count_their_own_versions_are_told_apart(tmp_path, cell):
    """The gates of a cell: parts of one product by `unsafe_chunk`, each changed in place after the one before moved."""
    torch.manual_seed(0)
    model, x = cell(64, 64), torch.randn(3, 32, 64)

    def gradients(context):
        model.zero_grad()
        with context:
            state = None
            for at_step in x:
                state = model(at_step, state)
            loss = (state if cell is nn.GRUCell else state[0]).square().sum()
        loss.backward()
        return [p.grad for p in model.parameters()]

    offload = disk(tmp_path)
    assert_same_bits(gradients(offload), gradients(contextlib.nullcontext()))
    assert offload.statistics["moved"] > 3


class ReturnsSaved(torch.autograd.Function):
    """x h, of a loss that is the sum: the gradient of x is the tensor that was saved."""

    @staticmethod
    def forward(ctx, x, h):
        ctx.save_for_backward(h)
        return x * h

    @staticmethod
    def backward(ctx, dy):
        (h,) = ctx.saved_tensors
        return h, None


def test_gradients_that_are_saved_tensors_are_the_callers(tmp_path):
    x, h = torch.randn(64, 64, requires_grad=True), torch.randn(64, 64) * 1
    with disk(tmp_path):
        loss = ReturnsSaved.apply(x, h).sum()
    loss.backward(retain_graph=True)
    assert torch.equal(x.grad, h)
    x.grad.zero_()
    loss.backward(retain_graph=True)
    assert torch.equal(x.grad, h)
    loss.backward(retain_graph=True)
    loss.backward()
    assert torch.equal(x.grad, 3 * h)


@pytest.mark.parametrize("writing", ["done", "under way", "failed"])
def test_what_was_written_to_is_not_handed_out_again(tmp_path, writing):
    def wait():
        raise OSError

    store, values = TieredStore("disk", path=tmp_path), torch.arange(200, dtype=torch.uint8)
    stored = store.put(values)
    stored.extent.writing.wait()
    if writing != "done":
        stored.extent = SimpleNamespace(writing=SimpleNamespace(done=lambda: writing == "failed", wait=wait))
    first = store.load(stored)
    again = store.load(stored)
    assert first.data_ptr() == again.data_ptr()
    again.view(torch.int32)[0] = 7
    assert torch.equal(store.load(stored), values)


def test_one_backward_reads_what_it_uses_at_once_a_single_time(tmp_path):
    """And the next one reads it again: a gradient that the first one left may be the memory itself."""
    offload, kept, seen = disk(tmp_path), [], []

    class Sees(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, h):
            ctx.save_for_backward(h)
            return x * 1

        @staticmethod
        def backward(ctx, dy):
            kept.append(ctx.saved_tensors[0])
            seen.append(kept[-1].data_ptr())
            return dy, None

    x, h = torch.randn(64, 64, requires_grad=True), torch.randn(64, 64) * 1
    with offload:
        loss = Sees.apply(Sees.apply(x, h), h.t()).sum()
    for _ in range(2):
        loss.backward(retain_graph=True)
    assert seen[0] == seen[1] != seen[2] == seen[3]
    assert offload.statistics["moved"] == 1
