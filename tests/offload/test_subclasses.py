"""Offload of tensors that wrap others: DTensors, quantised and jagged tensors, results of collectives."""

import pytest
import torch
import torch.distributed as dist
from offloaded_model import assert_same_bits, batch, disk
from ranks import run_ranks
from torch import nn
from torch.distributed import _functional_collectives as collectives

from memkernels.quant import quantize_nf4

pytest.importorskip("memkernels._runtime", reason="built without pybind11 or Python's headers")

KB, MB = 1 << 10, 1 << 20


class Multiply(torch.autograd.Function):
    """x w^T of a tensor that dequantises."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x @ weight.dequantize().t()

    @staticmethod
    def backward(ctx, dy):
        (weight,) = ctx.saved_tensors
        assert weight.shape == (256, 128)
        return dy @ weight.dequantize(), None


def test_quantised_tensors(tmp_path):
    offload, x = disk(tmp_path, min_bytes=2 * KB), torch.randn(8, 128, requires_grad=True)
    weight = quantize_nf4(torch.randn(256, 128))
    with offload:
        y = Multiply.apply(x, weight.clone())
    assert offload.statistics["moved"] == 1  # the codes; the rest is small
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(8, 256) @ weight.dequantize())
    offload, x.grad = disk(tmp_path), None
    with offload:
        y = Multiply.apply(x, nn.Parameter(weight, requires_grad=False))
    y.sum().backward()
    assert offload.statistics["moved"] == 0


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_dtensors(tmp_path, mesh):
    from torch.distributed.tensor import DTensor, Shard

    def compute(offload):
        x = DTensor.from_local(batch().flatten(0, 1), mesh, [Shard(0)]).requires_grad_()
        if offload is None:
            y = (x * 2).sin().exp()
        else:
            with offload:
                y = (x * 2).sin().exp()
        y.sum().backward()
        assert isinstance(x.grad, DTensor)
        return [y.detach().full_tensor(), x.grad.full_tensor()]

    offload = disk(tmp_path)
    assert_same_bits(compute(offload), compute(None))
    assert offload.statistics["moved"] == 2


def test_tensors_of_torchs_quantised_dtypes_stay(tmp_path):
    weight = torch.quantize_per_tensor(torch.randn(256, 128), 0.05, 3, torch.qint8)
    offload, x = disk(tmp_path), torch.randn(8, 128, requires_grad=True)
    with offload:
        y = Multiply.apply(x, weight)
    y.sum().backward()
    assert offload.statistics["moved"] == 0
    assert torch.equal(x.grad, torch.ones(8, 256) @ weight.dequantize())


@pytest.mark.parametrize("min_bytes", [1, MB], ids=["moved", "stays"])
def test_dtensors_that_change_in_place(tmp_path, mesh, min_bytes):
    from torch.distributed.tensor import DTensor, Shard

    x = torch.randn(64, 64)
    sharded = DTensor.from_local(x, mesh, [Shard(0)]).requires_grad_()
    offload = disk(tmp_path, min_bytes=min_bytes)
    with offload:
        h = sharded * 1
        before = h.sin()
        h.mul_(2)
        after = h.cos()
    assert offload.statistics["moved"] == (2 if min_bytes == 1 else 0)
    (gradient,) = torch.autograd.grad(after.sum(), sharded)
    torch.testing.assert_close(gradient.full_tensor(), -2 * (2 * x).sin())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        before.sum().backward()


def test_nested_tensors_that_are_no_subclass_stay(tmp_path):
    leaves = [torch.randn(n, 16, requires_grad=True) for n in (30, 50)]

    def gradients():
        nested = torch.nested.as_nested_tensor(leaves)
        loss = torch.nested.to_padded_tensor((nested * 2).softmax(-1), 0).square().sum()
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    with disk(tmp_path):
        found = gradients()
    assert_same_bits(found, gradients())


def test_jagged_tensors(tmp_path):
    values, offsets = torch.randn(300, 16), torch.tensor([0, 100, 130, 300])

    def gradient(offload):
        leaf = values.clone().requires_grad_()
        jagged = torch.nested.nested_tensor_from_jagged(leaf, offsets)
        if offload is None:
            loss = (((jagged * 2).sin() * jagged).exp() * jagged).values().sum()
        else:
            with offload:
                loss = (((jagged * 2).sin() * jagged).exp() * jagged).values().sum()
        loss.backward()
        return [loss.detach(), leaf.grad]

    offload = disk(tmp_path)
    assert_same_bits(gradient(offload), gradient(None))
    assert offload.statistics["moved"] >= 3


def test_results_of_collectives_are_waited_for(tmp_path, monkeypatch):
    arriving = torch.zeros(64, 64)
    monkeypatch.setattr(collectives, "wait_tensor", lambda tensor: tensor.fill_(3) if tensor is arriving else tensor)

    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, h):
            ctx.save_for_backward(h)
            return x * 1

        @staticmethod
        def backward(ctx, dy):
            return dy * ctx.saved_tensors[0], None

    offload, x = disk(tmp_path), torch.randn(64, 64, requires_grad=True)
    with offload:
        y = Keeps.apply(x, collectives.AsyncCollectiveTensor(arriving))
    y.sum().backward()
    assert offload.statistics["moved"] == 1 and torch.equal(x.grad, torch.full((64, 64), 3.0))


def train_in_parallel(path):
    """Loss and gradients of two layers, each divided among the ranks, with sequences divided between them."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    torch.manual_seed(0)
    model = nn.Sequential(
        *(
            layer
            for _ in range(2)
            for layer in (nn.LayerNorm(256), nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))
        )
    )
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for first in (0, 4):
        parts = (
            SequenceParallel(),
            ColwiseParallel(input_layouts=Shard(1)),
            None,
            RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        )
        parallelize_module(model, mesh, {str(first + i): part for i, part in enumerate(parts) if part is not None})
    x = torch.randn(4, 256, 256, generator=torch.Generator().manual_seed(dist.get_rank()))

    def train(offload):
        model.zero_grad()
        if offload is None:
            loss = model(x).to_local().square().sum()
        else:
            with offload:
                loss = model(x).to_local().square().sum()
        loss.backward()
        return [loss.detach(), *(p.grad.full_tensor() for p in model.parameters())]

    offload = disk(path, max_host_bytes=None)
    for _ in range(2):
        assert_same_bits(train(offload), train(None))
    assert offload.statistics["moved"] > 0


def test_models_divided_by_tensor_parallelism(tmp_path):
    run_ranks(train_in_parallel, 2, tmp_path, str(tmp_path), seconds=120)
