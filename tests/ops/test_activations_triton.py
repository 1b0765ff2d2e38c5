"""The Triton activations and derivatives, in float32, against PyTorch's autograd in float64."""

import pytest
import torch
import triton
import triton.language as tl

from memkernels.ops.activations_triton import act, act_and_grad
from memkernels.ops.gated_activation.reference import ACTIVATIONS
from memkernels.testing import assert_within_factor_two


@triton.jit
def _apply(x_ptr, y_ptr, pair_y_ptr, pair_grad_ptr, size, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < size
    x = tl.load(x_ptr + offsets, mask=mask)
    y, grad = act_and_grad(x, ACTIVATION)
    tl.store(y_ptr + offsets, act(x, ACTIVATION), mask=mask)
    tl.store(pair_y_ptr + offsets, y, mask=mask)
    tl.store(pair_grad_ptr + offsets, grad, mask=mask)


def apply(x, activation):
    outputs = [torch.full_like(x, float("nan")) for _ in range(3)]
    _apply[(1,)](x, *outputs, x.numel(), ACTIVATION=activation, BLOCK=triton.next_power_of_2(x.numel()))
    return outputs


def value_and_grad(function, x):
    x = x.clone().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_value_and_derivative(activation):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.cat([torch.linspace(-12, 12, 501), torch.tensor([0.0, -0.0, 80.0, -80.0])]).to(device)
    y, pair_y, grad = apply(x, activation)
    assert torch.equal(y, pair_y)
    exact, plain = (value_and_grad(ACTIVATIONS[activation], value) for value in (x.double(), x))
    assert_within_factor_two("value", y, exact[0], plain[0], atol=1e-7)
    assert_within_factor_two("derivative", grad, exact[1], plain[1], atol=1e-7)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_large_values(activation):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.tensor([float("nan"), 1e4, -1e4], device=device)
    y, _, grad = apply(x, activation)
    exact, slope = value_and_grad(ACTIVATIONS[activation], x.double())
    torch.testing.assert_close(y.double(), exact, equal_nan=True, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double()[1:], slope[1:], rtol=1e-6, atol=0)
