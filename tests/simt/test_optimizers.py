"""The optimizers' steps in CUDA C++ as operators, on CPU tensors: the bits of the CPU kernels and of the reference.

The build of the CPU kernels for no instruction set in particular rounds each operation on its own, as csrc/simt and
PyTorch do; others, and GPUs, fuse products with sums.
"""

from __future__ import annotations

import pytest
import torch

from memkernels import optim
from memkernels.optim import codes, operators, reference, rounding
from memkernels.testing import assert_within_factor_two, implementations

pytestmark = pytest.mark.xdist_group("simt_operators")  # one library, compiled once

SIZES = (0, 1, 127, 129, 255, 256, 257, 4097)
KEPT = ("float32", "stochastic", "remainder")
RULES = {
    "adamw": ((True, False), {"lr": 3e-2, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.1}),
    "lion": ((True,), {"lr": 1e-2, "beta1": 0.8, "beta2": 0.95, "weight_decay": 0.1}),
    "sgd": (
        (True,),
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1, "nesterov": False},
    ),
    "sgd-nesterov": (
        (True,),
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0, "nesterov": True},
    ),
    "sgd-plain": ((), {"lr": 0.1, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.1, "nesterov": False}),
}
every_rule = pytest.mark.parametrize(
    ("rule", "bits"),
    [(rule, bits) for rule in ("adamw", "lion", "sgd") for bits in (32, 16, 8, 4)]
    + [("sgd-nesterov", 8), ("sgd-plain", 32)],
)
every_width = pytest.mark.parametrize("bits", [32, 16, 8, 4])


def normal(size, seed):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def placed(values, offset):
    """A copy that begins `offset` elements into a larger tensor of sevens."""
    whole = torch.full((values.numel() + offset + 9,), 7, dtype=values.dtype)
    return whole[offset : offset + values.numel()].copy_(values)


def group_of(signed, bits, sizes=SIZES, kept=KEPT):
    """The tensors of an operator: parameters of every size and kind in one call, with moments of a step before; every
    second one at addresses where no quad can be read at once."""
    params, grads, remainders, moments, absmax = [], [], [], [[] for _ in signed], [[] for _ in signed]
    for size in sizes:
        for kind in kept:
            seed, offset = 10 * len(params), len(params) % 2
            values = normal(size, seed)
            high, low = rounding.split(values) if kind == "remainder" else (values.bfloat16(), low_of_none())
            params.append(placed(values if kind == "float32" else high, offset))
            remainders.append(placed(low, offset) if low.numel() else low)
            grads.append(placed((10 * normal(size, seed + 1)).to(params[-1].dtype), offset))
            for k, sign in enumerate(signed):
                moment = normal(size, seed + 2 + k)
                stored, maxima = codes.encode(moment if sign else moment.square(), bits, sign)
                moments[k].append(placed(stored, offset))
                if maxima is not None:
                    absmax[k].append(placed(maxima, offset))
    return [params, grads, [m for of in moments for m in of], [a for of in absmax for a in of], remainders]


def low_of_none():
    return torch.empty(0, dtype=torch.int16)


def arguments(group, bits, numbers, *, steps=None, origins=None, scale=-0.3, factor=None, lr_factor=None):
    count = len(group[0])
    steps = steps or [1 + i % 3 for i in range(count)]
    origins = origins or [512 * i for i in range(count)]
    return (*group, steps, list(range(count)), origins, 5 << 40, bits, scale, factor, lr_factor, *numbers.values())


def copied(group):
    """With what lies around each tensor."""
    return [[t if t._base is None else t._base.clone().as_strided(t.shape, t.stride(), t.storage_offset()) for t in of]
            for of in group]  # fmt: skip


def assert_same_bits(ours, theirs):
    for mine, other in zip((t for of in ours for t in of), (t for of in theirs for t in of), strict=True):
        for a, b in ((mine, other), (mine._base, other._base)):
            if a is not None:
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.fixture
def native():
    """`torch.ops.memkernels` by the CPU kernels that fuse nothing."""
    (plain,) = (one for one in implementations("adamw_") if one.name == "cpu-baseline")
    with plain.active():
        yield torch.ops.memkernels


@every_rule
def test_a_step_has_the_bits_of_the_cpu_kernel(simt, native, rule, bits):
    signed, numbers = RULES[rule]
    name = f"{rule.split('-')[0]}_"
    ours = group_of(signed, bits)
    theirs = copied(ours)
    getattr(simt, name)(*arguments(ours, bits, numbers))
    getattr(native, name)(*arguments(theirs, bits, numbers))
    assert_same_bits(ours, theirs)


@every_rule
def test_a_step_has_the_bits_of_the_reference(simt, rule, bits):
    """But for codes of values between two, and what follows a square root, which torch does not round to nearest."""
    signed, numbers = RULES[rule]
    name = rule.split("-")[0]
    ours = group_of(signed, bits, sizes=(300,))
    theirs = copied(ours)
    getattr(simt, f"{name}_")(*arguments(ours, bits, numbers, factor=torch.tensor(0.7)))
    reference.step_group(
        getattr(reference, name), signed, *arguments(theirs, bits, {}, factor=torch.tensor(0.7)), **numbers
    )
    if name == "adamw":
        (plain, rounded, high), (*_, low) = ours.pop(0), ours.pop()
        (other, other_rounded, other_high), (*_, other_low) = theirs.pop(0), theirs.pop()
        torch.testing.assert_close(plain, other, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(rounding.join(high, low), rounding.join(other_high, other_low), rtol=1e-6, atol=1e-6)
        assert (rounded != other_rounded).sum() <= 1
    for mine, other in zip(ours, theirs, strict=True):
        for i, (a, b) in enumerate(zip(mine, other, strict=True)):
            if a.dtype == torch.uint8:
                sign = signed[i // len(KEPT)]
                a, b = (codes.decode(c, torch.ones(3), bits, sign, torch.Size([300])) for c in (a, b))
                assert (a != b).sum() <= 1, i
            else:
                assert torch.equal(a, b), i


def test_seventy_parameters_in_one_call(simt, native):
    """More than a launch takes, of sizes from nothing to several chunks."""
    signed, numbers = RULES["adamw"]
    sizes = [0, 9000, *(37 * i % 300 for i in range(68))]
    ours = group_of(signed, 8, sizes, kept=("stochastic",))
    theirs = copied(ours)
    for op, group in ((simt, ours), (native, theirs)):
        op.adamw_(*arguments(group, 8, numbers))
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize(("bits", "cut"), [(32, 2304), (32, 2500), (16, 2304), (16, 77), (8, 2304), (4, 2304)])
def test_a_part_of_a_parameter_has_the_whole_ones_random_bits(simt, bits, cut):
    signed, numbers = RULES["adamw"]
    whole = group_of(signed, bits, (5000,), kept=("stochastic",))
    halves = copied(whole)
    per_element = {1: cut, 0.5: cut // 2, 1 / 256: cut // 256, 1 / 128: cut // 128}
    at = {0: 1, 1: 1, 2: 0.5 if bits == 4 else 1, 3: 1 / 256 if bits == 8 else 1 / 128}
    simt.adamw_(*arguments(whole, bits, numbers, origins=[0], steps=[3]))
    for part in (0, 1):
        group = [
            [t[: per_element[at[k]]] if part == 0 else t[per_element[at[k]] :] for t in of] if k in at else of
            for k, of in enumerate(halves)
        ]
        simt.adamw_(*arguments(group, bits, numbers, origins=[part * cut], steps=[3]))
    assert_same_bits(whole, halves)


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_what_is_not_finite_stays_in_its_block(simt, native, bits):
    signed, numbers = RULES["adamw"]
    ours = group_of(signed, bits, (1000,))
    for grad, value in zip(ours[1], (torch.nan, torch.inf, -torch.inf), strict=True):
        grad[300] = value
    theirs = copied(ours)
    for op, group in ((simt, ours), (native, theirs)):
        op.adamw_(*arguments(group, bits, numbers, scale=1.0))
    assert not ours[0][0][300].isfinite() and ours[0][0][600:].isfinite().all()
    for mine, other in zip(ours[0] + ours[2] + ours[3], theirs[0] + theirs[2] + theirs[3], strict=True):
        assert torch.equal(mine.nan_to_num(), other.nan_to_num())


def test_a_number_of_a_tensor_scales_the_gradient(simt):
    signed, numbers = RULES["adamw"]
    ours = group_of(signed, 8, (700,))
    theirs = copied(ours)
    simt.adamw_(*arguments(ours, 8, numbers, scale=-4.0, factor=torch.tensor([0.125])))
    simt.adamw_(*arguments(theirs, 8, numbers, scale=-0.5))
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("rule", ["adamw", "lion", "sgd"])
def test_a_number_of_a_tensor_is_the_learning_rate(simt, native, rule):
    signed, numbers = RULES[rule]
    name, lr = f"{rule}_", torch.tensor([numbers["lr"]])
    ours, theirs, plain = (group_of(signed, 32, (700,)) for _ in range(3))
    (p, *_), (g, *_) = ([t.double() for t in of] for of in ours[:2])
    moments = [m.double() for m in ours[2][:: len(KEPT)]]
    exact, *_ = getattr(reference, rule)(p, -0.3 * g, *moments, step=1, **numbers)
    getattr(simt, name)(*arguments(ours, 32, numbers | {"lr": 1.0}, lr_factor=lr))
    getattr(native, name)(*arguments(theirs, 32, numbers | {"lr": 1.0}, lr_factor=lr))
    getattr(simt, name)(*arguments(plain, 32, numbers))
    assert_same_bits(ours, theirs)
    assert_within_factor_two(rule, ours[0][0], exact, plain[0][0], atol=1e-7)


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2, dtype=torch.float64)], ids=["number", "tensor"])
@pytest.mark.parametrize(
    "cls", [optim.AdamW, optim.Lion, lambda params, **options: optim.SGD(params, momentum=0.9, **options)]
)
def test_optimizers_step_by_the_kernels(calls, monkeypatch, cls, lr):
    monkeypatch.setattr(
        "memkernels.optim.clipping.is_on_gpu", lambda number: number is lr and isinstance(lr, torch.Tensor)
    )
    params = [torch.nn.Parameter(normal(700, 1)), torch.nn.Parameter(normal((30, 7), 2).bfloat16())]
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    optimizers = [cls(of, lr=lr, state_bits=8, rounding="remainder", maximize=True) for of in (params, copies)]
    for step in range(2):
        for param, copy in zip(params, copies, strict=True):
            param.grad = normal(param.shape, 3 + step).to(param.dtype)
            copy.grad = param.grad.clone()
        optimizers[0].step(max_norm=0.5, loss_scale=2.0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(operators, "has_kernel", lambda *_: False)
            optimizers[1].step(max_norm=0.5, loss_scale=2.0)
    assert set(calls) == {"square_sum", f"{optimizers[0].operator}_"}
    torch.testing.assert_close(optimizers[0].grad_norm, optimizers[1].grad_norm)
    for ours, theirs in zip(params, copies, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_square_sum(simt, dtype):
    tensors = [normal(size, i).to(dtype) for i, size in enumerate((0, 1, 8193))]
    tensors += [normal((40, 50), 7).to(dtype).t(), normal(1001, 8).to(dtype)[1:], normal(99, 9)]
    exact = sum(tensor.double().square().sum() for tensor in tensors)
    result = simt.square_sum(tensors)
    assert result.shape == () and result.dtype == torch.float64
    assert abs(result - exact) <= 1e-6 * exact  # 32 float32 sums of squares a thread


def test_square_sum_of_more_than_a_launch_takes(simt):
    assert simt.square_sum([torch.full((3,), float(i)) for i in range(66)]) == 3 * sum(i * i for i in range(66))
    assert simt.square_sum([torch.ones(0)]) == 0


def test_bad_arguments_are_named(simt):
    signed, numbers = RULES["adamw"]
    group = group_of(signed, 8, (300,), kept=("float32",))
    before = copied(group)
    good = arguments(group, 8, numbers)
    for at, wrong, message in (
        (0, [torch.ones(300).double()], r"params\[0\]: expected float32 or bfloat16"),
        (1, [torch.ones(299)], r"grads\[0\]: expected 300 contiguous elements"),
        (2, group[2][:1], "moments: expected 2 for 1 parameters, got 1"),
        (3, [group[3][0], group[3][1][:1]], r"absmax\[1\]: expected 2 contiguous elements"),
        (7, [128], r"origins\[0\]: expected a multiple of 256 from 0 on, got 128"),
        (9, 5, "state_bits: expected 32, 16, 8 or 4, got 5"),
        (11, torch.ones(2), "grad_factor: expected one element, got 2"),
    ):
        with pytest.raises(RuntimeError, match=message):
            simt.adamw_(*good[:at], wrong, *good[at + 1 :])
    with pytest.raises(RuntimeError, match="expected float32, bfloat16 or float16"):
        simt.square_sum([torch.ones(3).double()])
    assert_same_bits(group, before)
