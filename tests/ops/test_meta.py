"""Ops on tensors without values: shapes and dtypes are those of the same call on CPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from memkernels import ops, quant

T, K, E, D, N = 6, 2, 4, 64, 32


def zeros(*shape, dtype=torch.bfloat16):
    return torch.zeros(*shape, dtype=dtype, requires_grad=True)


def ids(*shape):
    return torch.zeros(*shape, dtype=torch.int64)


def every_plan():
    """Of tokens that choose, with and without a capacity, and some of more choices than experts; of experts that do."""
    return (
        *ops.moe_plan(ids(T, K), E)[:4],
        *ops.moe_plan(ids(T, K), E, capacity=2)[:4],
        *ops.moe_plan(torch.full((T, E + 1), E), E)[:4],
        *ops.expert_choice_plan(ids(E, 3), T)[0],
        ops.moe_plan(ids(T, K), E).token_of_row,
        ops.moe_plan(ids(T, K), E).dropped,
    )


def dispatch_and_combine(x, weights):
    x_grouped, plan = ops.moe_dispatch(x, ids(T, K), E)
    return ops.moe_combine(x_grouped, plan, weights)


def combine_of_expert_choice(x, weights):
    plan, _ = ops.expert_choice_plan(ids(E, 3), T)
    return ops.moe_combine(x, plan, weights)


def grouped_matmul(x_grouped, *weights):
    return ops.grouped_matmul(x_grouped, weights[0] if len(weights) == 1 else weights, ops.moe_plan(ids(T, K), E))


def adapted(weight, lora_a, lora_b):
    return ops.ExpertsLoRAWeight(weight, lora_a, lora_b, 2.0)


def moe_mlp(x, w_gate_up, w_down, **options):
    return ops.moe_mlp(x, ids(T, K), torch.ones(T, K), w_gate_up, w_down, **options)


def attention_block(x, *weights):
    return ops.attention_block(x, *weights, num_heads=2, causal=True)


# What is called, and the tensors it is called with, made on the device that is set.
CASES = {
    "moe_plan": (every_plan, lambda: ()),
    "moe_dispatch, moe_combine": (dispatch_and_combine, lambda: (zeros(T, D), zeros(T, K))),
    "moe_combine of experts' choice": (combine_of_expert_choice, lambda: (zeros(E * 3, D), zeros(E * 3))),
    "grouped_matmul": (grouped_matmul, lambda: (zeros(T * K, D), zeros(E, N, D))),
    "grouped_matmul of weights apart": (grouped_matmul, lambda: (zeros(T * K, D), *(zeros(N, D) for _ in range(E)))),
    "grouped_matmul of adapters": (
        lambda x, *of: grouped_matmul(x, adapted(*of)),
        lambda: (zeros(T * K, D), zeros(E, N, D), zeros(E, 2, D), zeros(E, N, 2)),
    ),
    "moe_mlp": (moe_mlp, lambda: (zeros(T, D), zeros(E, 2 * N, D), zeros(E, D, N))),
    "moe_mlp with dropout": (
        lambda *of: moe_mlp(*of, dropout_p=0.5, seed=1),
        lambda: (zeros(T, D), zeros(E, N, D), zeros(E, D, N)),
    ),
    "gated_mlp": (ops.gated_mlp, lambda: (zeros(T, D), zeros(N, D), zeros(N, D), zeros(D, N))),
    "lora_linear": (ops.lora_linear, lambda: (zeros(T, D), zeros(N, D), zeros(2, D), zeros(N, 2))),
    "lora_embedding": (
        lambda *of: ops.lora_embedding(ids(T), torch.zeros(N, D, dtype=of[0].dtype), *of),
        lambda: (zeros(2, N), zeros(D, 2)),
    ),
    "linear_cross_entropy": (
        lambda x, weight: ops.linear_cross_entropy(x, weight, ids(T)),
        lambda: (zeros(T, D), zeros(N, D)),
    ),
    "attention": (ops.attention, lambda: tuple(zeros(1, T, 2, 16) for _ in range(3))),
    "attention_block": (attention_block, lambda: (zeros(1, T, D), *(zeros(D, D) for _ in range(4)))),
}


def described(case, dtype):
    """Shapes and dtypes of a case's results, and of the gradients of what it was called with."""
    function, tensors = CASES[case]
    inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors()]
    results = function(*inputs)
    results = (results,) if isinstance(results, torch.Tensor) else results
    if inputs:
        results[0].sum().backward()
    made = [*results, *(tensor.grad for tensor in inputs)]
    return [None if tensor is None else (tensor.shape, tensor.dtype) for tensor in made]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_on_meta(case, dtype):
    with torch.device("meta"):
        on_meta = described(case, dtype)
    assert on_meta == described(case, dtype)


@pytest.mark.parametrize("case", CASES)
def test_fake_tensors(case):
    with FakeTensorMode():
        fake = described(case, torch.bfloat16)
    assert fake == described(case, torch.bfloat16)


@pytest.mark.parametrize("size", [(N, D), (E, N, D)], ids=["linear", "grouped_matmul"])
def test_int8_on_meta(size):
    weight = quant.quantize_int8(torch.randn(size)).to("meta")
    with torch.device("meta"):
        x = torch.zeros(T * K, D, requires_grad=True)
        y = torch.nn.functional.linear(x, weight) if len(size) == 2 else grouped_matmul(x, weight)
        y.sum().backward()
    assert (y.shape, x.grad.shape) == ((T * K, N), x.shape)
