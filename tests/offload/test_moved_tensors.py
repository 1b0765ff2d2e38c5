"""offload_activations: which saved tensors move, how many bytes of them, and in which order they are read ahead."""

import weakref

import pytest
import torch
from offloaded_model import assert_free, assert_same_bits, batch, build, disk, step
from torch import nn

from memkernels.offload.layers import LayerWatch

pytest.importorskip("memkernels._runtime", reason="built without pybind11 or Python's headers")

KB, MB = 1 << 10, 1 << 20


def test_a_branch_that_backward_does_not_reach_is_freed(tmp_path):
    offload, x = disk(tmp_path), torch.randn(512, 64, requires_grad=True)
    with offload:
        used, unused = torch.exp(x * 2), torch.exp(x * 3)
    used.sum().backward()
    assert torch.equal(x.grad, (torch.exp(x * 2) * 2).detach())
    assert_free(offload, left=512 * 64 * 4)  # of the branch that may still come
    del used, unused
    assert_free(offload)


def test_what_shares_a_storage_moves_once(tmp_path):
    offload = disk(tmp_path, max_host_bytes=16 * MB)
    x = torch.randn(512, 768, requires_grad=True)
    with offload:
        h = x * 1.0
        parts = h.view(512, 3, 256).unbind(1)
        y = sum((part.transpose(0, 1).sin().exp() * part.T).sum() for part in parts) + (h * h).sum()
    counted = offload.statistics
    y.backward()
    # h itself, and of each part: sin's result is exp's argument and not saved, its exponential is.
    assert counted["disk_bytes_written"] == 4 * 512 * 768 * 2 and counted["shared"] >= 4
    gradient, x.grad = x.grad, None
    h = x * 1.0
    parts = h.view(512, 3, 256).unbind(1)
    (sum((part.transpose(0, 1).sin().exp() * part.T).sum() for part in parts) + (h * h).sum()).backward()
    assert torch.equal(gradient, x.grad)


def test_a_small_part_of_a_large_storage_moves_alone(tmp_path):
    offload, weight = disk(tmp_path), torch.ones(4, 33, requires_grad=True)
    large = torch.randn(1000, 133)[:, 1:]
    with offload:
        y = large[500:520, 3:36] @ weight.t()
    assert offload.statistics["moved"] == 1
    assert 0 <= offload.statistics["disk_bytes_written"] - 4 * (19 * 133 + 33) < 64
    y.sum().backward()
    torch.testing.assert_close(weight.grad, large[500:520, 3:36].sum(0).expand(4, 33))


def test_what_is_expanded_takes_no_room(tmp_path):
    offload, x = disk(tmp_path), torch.randn(300, 512, requires_grad=True)
    row, one = torch.randn(512) * 1, torch.randn(()) * 1
    with offload:
        y = x * row.expand(300, 512) + x * one.expand(300, 512)
    assert offload.statistics["disk_bytes_written"] == 2048
    y.sum().backward()
    assert torch.equal(x.grad, row.expand(300, 512) + one.expand(300, 512))


def test_complex_views_and_empty_tensors(tmp_path):
    def compute():
        z = torch.complex(*torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))).requires_grad_()
        h = z * 1
        y = (h.conj() * h).real + (h.conj().imag * h.imag) + torch.cat([h[:0].real, h.real]) * h.mH.conj().real
        y.sum().backward()
        return [y.detach(), z.grad]

    with disk(tmp_path):
        found = compute()
    assert_same_bits(found, compute())


def test_parameters_buffers_leaves_and_small_tensors_stay(tmp_path):
    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.frozen = nn.Parameter(torch.randn(64, 64)), nn.Parameter(torch.randn(64, 64), False)
            self.register_buffer("table", torch.randn(64, 64))

        def forward(self, x):
            return (x @ self.weight.t() @ self.frozen.data * self.table * self.table.t()).sum()

    offload, x = disk(tmp_path), torch.randn(64, 64, requires_grad=True)
    with offload:
        Owner()(x)
    assert offload.statistics["moved"] == 0 and offload.statistics["stayed"] > 4


def test_the_last_layers_and_the_loss_stay(tmp_path):
    model, x = build(layers=4), batch()
    moved = []
    for keep in range(6):
        offload = disk(tmp_path, keep_last_layers=keep)
        for _ in range(2):
            step(model, x, offload)
        moved.append(offload.statistics["moved"] / 2)
    layers = moved[1] - moved[2]
    assert moved[0] > moved[1] > layers and moved[2] - moved[3] == moved[3] - moved[4] == layers
    assert moved[4] == moved[5] < layers


def test_the_last_layers_of_lists_of_lists_are_known():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleList(nn.Linear(4, 4) for _ in range(2)) for _ in range(2))

        def forward(self, x):
            for layer in (*self.layers[0], *self.layers[1]):
                x = layer(x)
                seen.append(watch.in_last_layers)
            return x

    seen, watch = [], LayerWatch(1, weakref.WeakKeyDictionary())
    try:
        Nested()(torch.ones(2, 4))
    finally:
        watch.end()
    assert seen == [False, False, False, True]


def test_the_second_step_reads_ahead_in_the_order_of_the_first(tmp_path):
    offload = disk(tmp_path, prefetch=1)
    leaves = [torch.randn(256 * (i + 1), requires_grad=True) for i in range(6)]
    load, ahead = offload._store.load, []

    def recorded(stored, then):
        ahead.append([other.nbytes // KB - 1 for other in then])
        return load(stored, then)

    offload._store.load = recorded
    for expected in ([[2], [], [4], [0], [3], [1]], [[0], [5], [1], [4], [2], [1]]):
        ahead.clear()
        with offload:
            outputs = [torch.exp(leaf) for leaf in leaves]
        for i in (3, 0, 5, 1, 4, 2):
            outputs[i].sum().backward(retain_graph=True)
        assert ahead == expected
