"""Muon's momentum in CUDA C++ as an operator, on CPU tensors: the bits of SGD's step in float32, rounded."""

from __future__ import annotations

import pytest
import torch
from optimizer_steps import normal

from memkernels import _library, optim
from memkernels.optim import codes, muon, reference

pytestmark = pytest.mark.xdist_group("simt_operators")  # one library, compiled once

FACTOR = torch.tensor(0.5)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (9, 31), (20, 256), (67, 129)], ids=str)
def test_a_direction_and_its_momentum(simt, shape, dtype, bits, nesterov):
    grad = normal(shape, 0, dtype)
    stored, maxima = codes.encode(normal(shape, 1).reshape(-1), bits, True)
    absmax = [] if maxima is None else [maxima]
    places, numbers = ([3], [2], [512], 7, bits), (-0.3, FACTOR)
    momentum, *of_blocks = ours = [stored.clone(), *(of.clone() for of in absmax)]
    direction = torch.full(shape, torch.nan, dtype=torch.bfloat16)
    simt.muon_momentum_(direction, [grad], [momentum], of_blocks, *places, *numbers, 0.9, nesterov)

    expected, theirs = torch.zeros(shape), [stored, *absmax]
    options = {"lr": -1.0, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0, "nesterov": nesterov}
    reference.step_group(
        reference.sgd, [True], [expected], [grad.float()], [stored.view(shape) if bits >= 16 else stored], absmax, [],
        *places, *numbers, **options,
    )  # fmt: skip
    assert torch.equal(direction, expected.bfloat16())
    for mine, other in zip(ours, theirs, strict=True):
        if mine.dtype == torch.uint8:  # but for codes of values between two
            mine, other = (codes.decode(of, torch.ones(99), bits, True, direction.shape) for of in (mine, other))
            assert (mine != other).sum() <= 1
        else:
            assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_muon_steps_by_the_kernels(calls, monkeypatch, dtype):
    monkeypatch.setattr(muon, "_PRODUCTS", {})
    ours, theirs = ([torch.nn.Parameter(normal(shape, 0, dtype)) for shape in ((40, 24), (17, 63))] for _ in range(2))
    optimizers = [optim.Muon(params, lr=0.05, state_bits=8, rounding="remainder") for params in (ours, theirs)]
    for step in range(2):
        for i, (param, other) in enumerate(zip(ours, theirs, strict=True)):
            param.grad = normal(param.shape, 10 * step + i, dtype)
            other.grad = param.grad.clone()
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(_library._native_devices, "muon_momentum_", ["cpu"])
            optimizers[0].step(max_norm=0.5)
        optimizers[1].step(max_norm=0.5)
    assert set(calls) == {"square_sum", "muon_momentum_", "sgd_"}
    for param, other in zip(ours, theirs, strict=True):
        assert torch.equal(param, other)
