"""A small model, and steps of it with and without offload."""

import gc
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from memkernels.offload import offload_activations

DIM = 64


class Block(nn.Module):
    """Attention over a split of one product and a gated MLP, with dropout."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(DIM), nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.gate_up, self.down = nn.Linear(DIM, 4 * DIM), nn.Linear(2 * DIM, DIM)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, dim=-1))
        scores = (q @ k.transpose(-1, -2) * 0.25).softmax(dim=-1)
        x = x + self.out(F.dropout((scores @ v).transpose(1, 2).flatten(2), 0.1))
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Model(nn.Module):
    def __init__(self, layers=3, checkpointed=None):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(DIM, 50)
        self.register_buffer("scale", torch.ones(256, DIM))
        self.checkpointed = checkpointed

    def forward(self, x):
        x = x * self.scale[: x.shape[1]]
        for layer in self.layers:
            reentrant = self.checkpointed == "reentrant"
            x = checkpoint(layer, x, use_reentrant=reentrant) if self.checkpointed else layer(x)
        return self.head(x).float().logsumexp(-1).mean()


def build(**options):
    torch.manual_seed(0)
    return Model(**options)


def batch(seed=1, tokens=96):
    return torch.randn(2, tokens, DIM, generator=torch.Generator().manual_seed(seed))


def disk(path, **options):
    """Everything of 1 KiB and more to disk, through so little memory that it must be read again."""
    return offload_activations("disk", **({"path": path, "min_bytes": 1 << 10, "max_host_bytes": 1 << 19} | options))


def step(model, x, offload=None, backward=None):
    """Loss and gradients."""
    torch.manual_seed(2)
    model.zero_grad()
    if offload is None:
        loss = model(x)
    else:
        with offload:
            loss = model(x)
    (backward or torch.Tensor.backward)(loss)
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_same_bits(actual, expected):
    assert len(actual) == len(expected)
    for ours, plain in zip(actual, expected, strict=True):
        assert torch.equal(ours, plain)


def in_use(offload):
    gc.collect()
    return offload._store._file.statistics()["in_use"]


def assert_free(offload, left=0):
    """No more than `left` bytes on disk are in use once the last writes have ended."""
    deadline = time.monotonic() + 10
    while in_use(offload) > left and time.monotonic() < deadline:
        time.sleep(0.01)
    assert in_use(offload) == left
