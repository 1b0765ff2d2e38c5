"""Adapters that share an input: their operators, each adapter's own mask among them, and how blocks take them."""

import dataclasses
import functools

import pytest
import torch
from adapted_blocks import ATTENTION, HEADS, MLP, assembled, make_inputs, over_flat
from calls import Calls
from torch.utils._python_dispatch import TorchDispatchMode

from memkernels import ops
from memkernels.ops.gated_mlp import reference as mlp_reference
from memkernels.ops.lora_linear import operators, reference  # noqa: F401  (defines the operators)
from memkernels.testing import (
    assert_within_factor_two,
    check_op,
    implementations,
    poisoned_memory,
    random_tensor,
    saved_bytes,
)

OPERATORS = torch.ops.memkernels
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEEDS, FIRST_ROW = torch.tensor([-1234567890123456789, 5, 2**62, 0, -1]), 7
# On CPU the products are torch's around native dropout; on GPUs all of it is Triton's.
on_every_implementation = pytest.mark.parametrize("implementation", implementations("row_dropout"), ids=str)


def tensors(adapters, rows, k, rank, dtype, adapter):
    """x, dx, lora_a and p."""
    shapes = {"x": (rows, k), "dx": (rows, k), "lora_a": (adapters, rank, k), "p": (adapters, rows, rank)}
    return [
        random_tensor(*shape, dtype=adapter if name in ("lora_a", "p") else dtype, seed=i, scale=shape[-1] ** -0.5)
        for i, (name, shape) in enumerate(shapes.items())
    ]


def one_by_one(x, dx, lora_a, p, seeds, dropout_p):
    """s, dx and dA of each adapter in plain PyTorch, in the adapter's dtype; the sum in x's."""
    dropped = x.to(p.dtype)[None].expand(len(p), -1, -1)
    through = torch.bmm(p, lora_a)
    if dropout_p:
        masked = [
            [
                reference.row_dropout(rows, seed, dropout_p, FIRST_ROW, p.dtype)
                for rows, seed in zip(of, seeds, strict=True)
            ]
            for of in (dropped, through)
        ]
        dropped, through = map(torch.stack, masked)
    return torch.bmm(dropped, lora_a.mT), (dx + through.sum(0)).to(dx.dtype), torch.bmm(p.mT, dropped)


@on_every_implementation
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("dtype", "adapter", "adapters", "rank", "k"),
    [
        *((dtype, dtype, 3, 5, 130) for dtype in DTYPES),
        (torch.bfloat16, torch.float32, 2, 70, 64),
        (torch.bfloat16, torch.bfloat16, 5, 3, 70),
    ],
    ids=str,
)
def test_operators_match_each_adapter_alone(implementation, dropout_p, dtype, adapter, adapters, rank, k):
    of = [tensor.detach() for tensor in tensors(adapters, 67, k, rank, dtype, adapter)]
    seeds = SEEDS[:adapters]
    exact = one_by_one(*(tensor.double() for tensor in of), seeds, dropout_p)
    plain = one_by_one(*of, seeds, dropout_p)
    with implementation.active() as device, poisoned_memory():
        x, dx, lora_a, p = (tensor.to(device) for tensor in of)
        mask = (seeds.to(device) if dropout_p else None, dropout_p, FIRST_ROW)
        s = OPERATORS.lora_down_shared(x, lora_a, *mask)
        OPERATORS.lora_input_add_shared_(dx, p, lora_a, *mask)
        ours = s, dx, OPERATORS.lora_down_grad_shared(p, x, *mask)
    for name, actual, of_exact, of_plain in zip(("s", "dx", "da"), ours, exact, plain, strict=True):
        # dx on CPU is rounded once an adapter where there is dropout.
        assert_within_factor_two(name, actual.cpu(), of_exact, of_plain, roundings=adapters)


@on_every_implementation
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_layouts_and_empty_sizes(implementation, dropout_p):
    with implementation.active() as device:
        mask = (SEEDS[:3].to(device) if dropout_p else None, dropout_p, FIRST_ROW)

        def every_operator(x, dx, lora_a, p):
            dx = dx.clone(memory_format=torch.contiguous_format)
            OPERATORS.lora_input_add_shared_(dx, p, lora_a, *mask)
            return OPERATORS.lora_down_shared(x, lora_a, *mask), dx, OPERATORS.lora_down_grad_shared(p, x, *mask)

        plain = [tensor.detach().to(device) for tensor in tensors(3, 35, 48, 4, torch.float32, torch.float32)]
        transposed = [tensor.mT.contiguous().mT for tensor in plain]
        for one, other in zip(every_operator(*plain), every_operator(*transposed), strict=True):
            torch.testing.assert_close(one, other)
        s, dx, da = every_operator(plain[0][:0], plain[1][:0], plain[2], plain[3][:, :0])
        assert s.shape == (3, 0, 4) and dx.shape == (0, 48) and torch.equal(da, torch.zeros_like(plain[2]))


@on_every_implementation
def test_operators_pass_opcheck(implementation):
    with implementation.active() as device:
        x, dx, lora_a, p = (tensor.detach().to(device) for tensor in tensors(3, 9, 20, 3, torch.float32, torch.float32))
        for mask in ((None, 0.0, 0), (SEEDS[:3].to(device), 0.3, 4)):
            torch.library.opcheck(OPERATORS.lora_down_shared.default, (x, lora_a, *mask))
            torch.library.opcheck(OPERATORS.lora_input_add_shared_.default, (dx, p, lora_a, *mask))
            torch.library.opcheck(OPERATORS.lora_down_grad_shared.default, (p, x, *mask))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_a_block_reads_what_its_adapters_share_once(dropout_p):
    inputs = make_inputs((9,), MLP, torch.float32)
    with Calls() as calls:
        y = over_flat(ops.gated_mlp, dropout_p)(**inputs)
    assert calls.names == ["lora_down_shared", "lora_up", "lora_up", "lora_down", "lora_up"]
    with Calls() as calls:
        y.sum().backward()
    counts = {"down": 0, "down_shared": 1, "down_grad_shared": 1, "input_add_shared_": 1}
    assert {name: calls.names.count(f"lora_{name}") for name in counts} == counts
    attention = over_flat(ops.attention_block, dropout_p, num_heads=HEADS, causal=True)
    y = attention(**make_inputs((2, 9), ATTENTION, torch.float32))
    with Calls() as calls:
        y.sum().backward()
    assert [calls.names.count(f"lora_{name}") for name in ("down", "down_shared")] == [1, 1]


class UpGrads(TorchDispatchMode):
    """What each call of `lora_up_grad` asks for: "p", "db", or both, of one dy."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is OPERATORS.lora_up_grad.default:
            _, s, *_, p_needed = args
            self.asked.append(" ".join(name for name, asked in (("p", p_needed), ("db", s is not None)) if asked))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("function", "names", "expected"),
    [
        (ops.gated_mlp, MLP, ["p db"] * 3),
        (functools.partial(ops.attention_block, num_heads=HEADS, causal=True), ATTENTION, ["p db"] * 4),
    ],
    ids=["gated_mlp", "attention_block"],
)
@pytest.mark.parametrize("magnitude", [False, True], ids=["lora", "dora"])
def test_a_block_makes_p_and_the_gradient_of_b_at_once(function, names, expected, magnitude):
    y = over_flat(function, 0.3)(**make_inputs((2, 9), names, torch.float32, magnitude=magnitude))
    with UpGrads() as calls:
        y.sum().backward()
    assert calls.asked == expected


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    "frozen",
    [("w_gate.a",), ("w_up.b",), ("w_gate.a", "w_up.a"), ("w_up.a", "w_up.b"), ("w_gate.b", "w_up.b")],
    ids=str,
)
def test_gradients_only_of_what_is_trained(dropout_p, frozen):
    inputs = make_inputs((21,), MLP, torch.float32)
    for name in frozen:
        inputs[name].requires_grad_(False)
    check_op(over_flat(ops.gated_mlp, dropout_p, tile_tokens=8), over_flat(mlp_reference.gated_mlp, dropout_p), inputs)


def test_adapters_of_other_ranks_go_alone():
    inputs = make_inputs((21,), MLP, torch.float32)
    inputs["w_up.a"], inputs["w_up.b"] = inputs["w_up.a"].detach()[:2], inputs["w_up.b"].detach()[:, :2]
    for name in ("w_up.a", "w_up.b"):
        inputs[name].requires_grad_(True)
    check_op(over_flat(ops.gated_mlp, 0.3), over_flat(mlp_reference.gated_mlp, 0.3), inputs)


def test_adapters_of_other_dropout_go_alone():
    inputs, p = make_inputs((21,), MLP, torch.float32), {"w_gate": 0.5, "w_up": 0.25, "w_down": 0.0}

    def over_each(function):
        def call(**tensors):
            given = assembled(tensors, 0.0)
            weights = {name: dataclasses.replace(given[name], dropout_p=p[name]) for name in MLP}
            return function(**given | weights)

        return call

    with Calls() as calls:
        over_each(ops.gated_mlp)(**inputs)
    assert calls.names.count("lora_down") == 3 and "lora_down_shared" not in calls.names
    check_op(over_each(ops.gated_mlp), over_each(mlp_reference.gated_mlp), inputs)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_layers_of_one_input_keep_it_once(dropout_p):
    tokens, k, rank = 64, 32, 3
    x = random_tensor(tokens, k, dtype=torch.bfloat16)
    weights = [
        [random_tensor(*shape, dtype=torch.bfloat16, seed=i) for shape in ((40, k), (rank, k), (40, rank))]
        for i in range(3)
    ]
    every = tuple(tensor for of in weights for tensor in of)
    saved = saved_bytes(
        lambda: torch.stack([ops.lora_linear(x, *of, dropout_p=dropout_p) for of in weights]), exclude=every
    )
    assert saved == tokens * k * 2 + 3 * tokens * rank * 2 + (3 * 8 if dropout_p else 0)
