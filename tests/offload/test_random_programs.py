"""Random programs, of views, changes in place, checkpoints and Functions, and random ways back through them."""

import contextlib
import random

import pytest
import torch
from offloaded_model import assert_same_bits
from torch import nn
from torch.utils.checkpoint import checkpoint

from memkernels.offload import offload_activations

pytest.importorskip("memkernels._runtime", reason="built without pybind11 or Python's headers")

KB = 1 << 10
N = 16


class ReturnsSaved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, h):
        ctx.save_for_backward(h, h.t())
        return x * h

    @staticmethod
    def backward(ctx, dy):
        h, transposed = ctx.saved_tensors
        return (h if dy.sum() > 0 else transposed.t()), None


def gates(a):
    first, second = torch.unsafe_chunk(a * 1, 2, 1)
    first.sigmoid_(), second.tanh_()
    return torch.cat([first * second, second * second], 1)


def changed_unseen(a):
    h = a * 1
    square = h * h.detach()
    h.detach().mul_(2)
    return square + h.detach().sin() * a


def complex_views(a, b):
    z = torch.complex(a, b)
    return (z * z.conj()).real + z.mH.imag


def paired(a):
    first, second = a.reshape(2, -1).mul(1).unbind(0)
    return torch.stack([first * second, second.tanh()]).view(N, N)


UNARY = [
    torch.sin,
    torch.tanh,
    torch.t,
    lambda a: (0.1 * a).exp(),
    lambda a: a.softmax(-1),
    lambda a: (a * 1).mul_(0.5).cos(),
    lambda a: (a * 1).relu_(),
    lambda a: a[torch.arange(N - 1, -1, -1)],
    lambda a: a.expand(3, N, N).prod(0),
    lambda a: nn.functional.dropout(a, 0.2),
    gates,
    changed_unseen,
    paired,
]
BINARY = [
    torch.mul,
    lambda a, b: 0.1 * (a @ b),
    lambda a, b: torch.cat([a[: N // 2], b[N // 2 :]]),
    lambda a, b: ReturnsSaved.apply(a, b.detach()),
    complex_views,
]


def forward(choose, leaves, layers):
    """A loss and some of the tensors on the way."""
    pool = [*leaves, torch.randn(N, N), torch.randn(1, N).expand(N, N), torch.randn(N, 2 * N)[:, ::2]]
    passed = []
    for _ in range(choose.randint(3, 20)):
        a, b = choose.choice(pool), choose.choice(pool)
        kind = choose.randrange(4)
        if kind == 0:
            pool.append(choose.choice(BINARY)(a, b))
        elif kind == 1:
            pool.append(checkpoint(layers, a, use_reentrant=False) if choose.random() < 0.5 else layers(a))
        else:
            pool.append(choose.choice(UNARY)(a))
        if choose.random() < 0.2:
            pool.pop(choose.randrange(len(pool)))
        if choose.random() < 0.2 and pool[-1].requires_grad:
            passed.append(pool[-1])
    return sum((tensor * leaves[0].sum()).sum() for tensor in pool), passed


def backward(choose, loss, passed, leaves):
    """Gradients, by one of several ways back."""
    way = choose.randrange(4)
    if way == 0:
        gradients = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        sum(gradient.square().sum() for gradient in gradients if gradient is not None).backward()
        return gradients
    if way == 1:
        for tensor in passed:
            tensor.sum().backward(retain_graph=True)
        for leaf in leaves:
            if leaf.grad is not None:
                leaf.grad.mul_(2)  # perhaps the memory of a tensor that was saved
    if way == 2:
        loss.backward(retain_graph=True)
    loss.backward()
    return []


def run(seed, context):
    choose = random.Random(seed)
    torch.manual_seed(seed)
    leaves = [torch.randn(N, N, requires_grad=True) for _ in range(3)]
    layers = nn.Sequential(nn.Linear(N, N), nn.Linear(N, N))
    with contextlib.ExitStack() as stack:
        stack.enter_context(context)
        loss, passed = forward(choose, leaves, layers)
        if choose.random() < 0.5:
            stack.close()
        found = backward(choose, loss, passed, leaves)
    found = [loss, *found, *(tensor.grad for tensor in (*leaves, *layers.parameters()))]
    return [tensor.detach().view(torch.int32) for tensor in found if tensor is not None]  # there may be NaNs


@pytest.mark.parametrize(
    "seeds", [range(40), pytest.param(range(40, 600), marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_random_programs_keep_their_bits(tmp_path, seeds):
    policies = [
        ("disk", {"min_bytes": 1, "keep_last_layers": 0, "prefetch": 3, "max_host_bytes": 4 * KB}),
        ("disk", {"min_bytes": 600, "prefetch": 0, "max_host_bytes": 8 * KB}),
        ("disk", {"min_bytes": 1, "prefetch": 1, "max_host_bytes": 16 * KB}),
        ("auto", {"min_bytes": 1, "keep_last_layers": 2, "max_host_bytes": 16 * KB}),
    ]
    offloads = [offload_activations(tier, path=tmp_path, **options) for tier, options in policies]
    ran = 0
    for seed in seeds:
        try:
            expected = run(seed, contextlib.nullcontext())
        except RuntimeError as error:  # a change in place that autograd finds, without offload
            assert "modified by an inplace operation" in str(error)
            continue
        ran += 1
        for _ in range(2):
            assert_same_bits(run(seed, offloads[seed % 4]), expected)
    assert ran > len(seeds) / 2
    for count in ("moved", "shared", "stayed", "disk_bytes_read"):
        assert sum(offload.statistics[count] for offload in offloads) > ran
