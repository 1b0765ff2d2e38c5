"""FSDP2 over quantised weights and over layers with adapters: two processes on CPU by gloo, against one process."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from memkernels import nn, ops, quant

QUANTIZE = {"nf4": quant.quantize_nf4, "int8": quant.quantize_int8}


class Adapted(torch.nn.Module):
    """A frozen quantised weight and a trained adapter."""

    def __init__(self, kind, rows, columns):
        super().__init__()
        generator = torch.Generator().manual_seed(rows)
        self.weight = torch.nn.Parameter(
            QUANTIZE[kind](torch.randn(rows, columns, generator=generator)), requires_grad=False
        )
        self.lora_a = torch.nn.Parameter(torch.randn(4, columns, generator=generator))
        self.lora_b = torch.nn.Parameter(torch.randn(rows, 4, generator=generator))

    def forward(self, x):
        return torch.tanh(ops.lora_linear(x, self.weight, self.lora_a, self.lora_b))


def build(kind):
    # Of the first weight each rank's half has whole nested blocks, of the second it has not.
    layers = [Adapted(kind, 512, 128), Adapted(kind, 96, 512)]
    torch.manual_seed(0)
    quantized, dense = torch.nn.Linear(96, 64), torch.nn.Linear(64, 32)
    quantized.weight = torch.nn.Parameter(QUANTIZE[kind](quantized.weight.detach()), requires_grad=False)
    layers += [nn.LoRALinear(base, 3, use_dora=True) for base in (quantized, dense)]
    for layer in layers[2:]:
        torch.nn.init.normal_(layer.adapter["lora_B"], std=0.3)
    return torch.nn.Sequential(*layers)


def train(rank, ranks, port, kind, results):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    torch.set_num_threads(1)
    model, plain = build(kind), build(kind)
    mesh = init_device_mesh("cpu", (ranks,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    local = model[0].weight.to_local()
    bytes_held = sum(part.nbytes for part in local.parts)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=1e-3) for m in (model, plain)]
    worst = 0.0
    for step in range(3):
        x = torch.randn(8, 128, generator=torch.Generator().manual_seed(step))
        losses = []
        for m, optimizer in zip((model, plain), optimizers, strict=True):
            loss = m(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        worst = max(worst, abs(losses[0] - losses[1]))
    dense = plain[0].weight.dequantize().chunk(ranks)[rank]
    same = torch.equal(model[0].weight.to_local().dequantize(), dense)
    results[rank] = worst, same, bytes_held, type(local).__name__, mixed_losses(kind, mesh)
    dist.destroy_process_group()


def mixed_losses(kind, mesh):
    """Loss and a gradient's norm with bfloat16 computing over float32 shards, and of a model that is bfloat16."""
    model, plain = build(kind), build(kind).to(torch.bfloat16)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(7)).to(torch.bfloat16)
    found = []
    for of in (model, plain):
        loss = of(x).float().square().mean()
        loss.backward()
        gradient = of[0].lora_b.grad
        gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        found.append((loss.item(), gradient.float()))
    (ours, gradient), (expected, of_plain) = found
    return ours, expected, ((gradient - of_plain).norm() / of_plain.norm()).item()


@pytest.mark.parametrize(("kind", "ranks"), [("nf4", 2), ("int8", 2), ("nf4", 1)])
def test_training_equals_that_of_one_process(kind, ranks):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = mp.get_context("spawn").Manager().dict()
    mp.spawn(train, (ranks, port, kind, results), nprocs=ranks)
    whole = sum(part.nbytes for part in build(kind)[0].weight.parts)
    for worst, same, held, name, (ours, expected, gradient_error) in results.values():
        assert (
            worst < 1e-6
            and same
            and held < 1.2 / ranks * whole
            and name == {"nf4": "NF4Tensor", "int8": "Int8Tensor"}[kind]
        )
        assert ours == expected and gradient_error < torch.finfo(torch.bfloat16).eps  # which plain rounds to
