"""optim.Muon and optim.Adafactor: against float64, torch's own, and at every width and rounding."""

import contextlib
import copy
import types

import pytest
import torch
from optimizer_steps import master, normal
from torch.utils._python_dispatch import TorchDispatchMode

from memkernels import optim
from memkernels.optim import adafactor, codes, muon, operators
from memkernels.testing import assert_within_factor_two, implementations, peak_bytes

on_every_implementation = pytest.mark.parametrize("implementation", implementations("sgd_"), ids=str)
every_width = pytest.mark.parametrize("bits", [32, 16, 8, 4])
MATRICES = ((40, 24), (17, 63), (1, 9), (64, 64))
SHAPES = ((40, 24), (3, 17, 9), (257,), (), (0,), (0, 5))
MUON = {"lr": 0.05, "weight_decay": 0.1, "momentum": 0.9}
ADAFACTOR = {"lr": 0.05, "weight_decay": 0.1}
RULES = {
    "muon": (optim.Muon, MATRICES, MUON),
    "muon, plain": (optim.Muon, MATRICES, MUON | {"nesterov": False, "adjust_lr_fn": "match_rms_adamw"}),
    "adafactor": (optim.Adafactor, SHAPES, ADAFACTOR),
    "adafactor, moment": (optim.Adafactor, SHAPES, ADAFACTOR | {"beta1": 0.9, "d": 1.5}),
}
every_rule = pytest.mark.parametrize("rule", RULES)


def parameters(shapes, dtype=torch.float32):
    return [torch.nn.Parameter(normal(shape, i, dtype)) for i, shape in enumerate(shapes)]


def train(optimizer, params, steps, first=0, **options):
    for step in range(first, first + steps):
        for i, param in enumerate(params):
            param.grad = normal(param.shape, 100 * step + i).bfloat16().to(param.dtype)
        optimizer.step(**options)


def expected(cls, param, grad, state, step, options, dtype):
    """A parameter and its states after a step, written down from the definitions, in dtype."""
    p, g = param.to(dtype), grad.to(dtype)
    decayed = p * (1 - options["lr"] * options["weight_decay"])
    if cls is optim.Muon:
        g, momentum = (1 - options["momentum"]) * g, options["momentum"]
        b = momentum * state["momentum_buffer"].to(dtype) + g
        u = g + momentum * b if options.get("nesterov", True) else b
        rows, columns = p.shape
        x = u.t() if rows > columns else u
        x = x / x.norm()
        for _ in range(5):
            gram = x @ x.t()
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        x = x.t() if rows > columns else x
        ratio = max(1, rows / columns) ** 0.5 if "adjust_lr_fn" not in options else 0.2 * max(rows, columns) ** 0.5
        return decayed - options["lr"] * ratio * x, {"momentum_buffer": b}
    c, least = step**-0.8, torch.finfo(param.dtype).eps
    new = {}
    if g.dim() < 2:
        v = new["variance"] = (1 - c) * state["variance"].to(dtype) + c * g * g
    else:
        row = new["row_var"] = (1 - c) * state["row_var"].to(dtype) + c * (g * g).mean(-1, keepdim=True)
        column = new["col_var"] = (1 - c) * state["col_var"].to(dtype) + c * (g * g).mean(-2, keepdim=True)
        v = row * column / row.mean(-2, keepdim=True).clamp(min=least)
    u = g / v.clamp(min=least**2).sqrt()

    def rms(x):
        return x.square().mean().sqrt() if x.numel() else x.new_zeros(())

    alpha = max(1e-3, rms(p)) * min(options["lr"], step**-0.5)
    u = alpha * u / max(1.0, rms(u) / options.get("d", 1.0))
    if "beta1" in options:
        u = new["exp_avg"] = 0.9 * state["exp_avg"].to(dtype) + (1 - 0.9) * u
    return decayed - u, new


def values_of(optimizer, param, bits):
    """The states as float32."""
    state = optimizer.state[param]
    values = {key: state[key].clone() for key in optimizer.float_states(param.shape) if key in state}
    for key, signed in optimizer.moments(optimizer.param_groups[0]):
        if key in state:
            values[key] = codes.decode(state[key], state.get(f"{key}_absmax"), bits, signed, param.shape).clone()
    return values


def zeros_of(optimizer, param):
    zeros = {key: torch.zeros(shape) for key, shape in optimizer.float_states(param.shape).items()}
    return zeros | {key: torch.zeros(param.shape) for key, _ in optimizer.moments(optimizer.param_groups[0])}


@on_every_implementation
@every_width
@every_rule
def test_two_steps_against_float64(implementation, rule, bits):
    cls, shapes, options = RULES[rule]
    params = parameters(shapes)
    optimizer = cls(params, **options, state_bits=bits)
    for step in (1, 2):
        old = [(p.detach().clone(), values_of(optimizer, p, bits) or zeros_of(optimizer, p)) for p in params]
        with implementation.active():
            train(optimizer, params, 1, first=step)
        for i, (param, (before, states)) in enumerate(zip(params, old, strict=True)):
            if not param.numel():
                continue
            exact, exact_states = expected(cls, before, param.grad, states, step, options, torch.float64)
            plain, plain_states = expected(cls, before, param.grad, states, step, options, torch.float32)
            assert_within_factor_two(f"parameter {i}", param.detach(), exact, plain, atol=1e-7)
            for key, value in values_of(optimizer, param, bits).items():
                if key in optimizer.float_states(param.shape) or bits == 32:
                    assert_within_factor_two(f"{key} {i}", value, exact_states[key], plain_states[key], atol=1e-7)
                elif bits < 16:
                    nearest = codes.decode(*codes.encode(plain_states[key], bits, True), bits, True, param.shape)
                    error, least = ((x - exact_states[key]).abs() for x in (value, nearest))
                    assert (error <= least + 1e-5 * exact_states[key].abs()).all(), (key, i)


@pytest.fixture
def no_kernel(monkeypatch):
    """Adafactor as where the library is not built."""
    for module in (adafactor, operators):
        monkeypatch.setattr(module, "has_kernel", lambda *_: False)


@every_width
@pytest.mark.parametrize("rule", ["adafactor", "adafactor, moment"])
def test_adafactor_where_no_kernel_runs(no_kernel, rule, bits):
    test_two_steps_against_float64(types.SimpleNamespace(active=contextlib.nullcontext), rule, bits)


class Reads(TorchDispatchMode):
    """Raises where the host asks for the value of a tensor."""

    def __init__(self, tensor):
        super().__init__()
        self.place = tensor.data_ptr()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        read = function is torch.ops.aten._local_scalar_dense.default and args[0].data_ptr() == self.place
        assert not read, "a GPU would be waited for"
        return function(*args, **(kwargs or {}))


@every_rule
@pytest.mark.parametrize("rate", [0.05, 0.0])
def test_no_step_waits_for_a_learning_rate_on_a_gpu(no_kernel, monkeypatch, rule, rate):
    cls, shapes, options = RULES[rule]
    ours, theirs = parameters(shapes), parameters(shapes)
    lr = torch.tensor(rate)
    monkeypatch.setattr("memkernels.optim.clipping.is_on_gpu", lambda number: number is lr)
    optimizers = [cls(params, **options | {"lr": of}) for params, of in ((ours, lr), (theirs, rate))]
    with Reads(lr):
        train(optimizers[0], ours, 2)
    train(optimizers[1], theirs, 2)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


def test_adafactor_is_the_same_for_any_number_of_threads():
    threads, of_each = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        params = parameters(((300, 401), (5, 260, 257), (70, 3, 3)))
        train(optim.Adafactor(params, **ADAFACTOR), params, 2)
        of_each.append(params)
    torch.set_num_threads(threads)
    assert all(torch.equal(one, several) for one, several in zip(*of_each, strict=True))


def test_adafactor_makes_no_tensor_of_a_parameters_size():
    """Where its kernel runs; of conv's weights, too, whose matrices are small."""
    shapes = ((512, 700), (40, 30, 90))
    for dtype in (torch.float32, torch.bfloat16):
        params = parameters(shapes, dtype)
        optimizer = optim.Adafactor(params, beta1=0.9, state_bits=8)
        train(optimizer, params, 1)
        assert peak_bytes(optimizer.step) < 0.2 * params[0].nbytes


@on_every_implementation
@every_rule
@pytest.mark.parametrize("kept", ["stochastic", "remainder"])
def test_bfloat16_parameters_lose_nothing_in_the_mean_or_at_all(implementation, rule, kept):
    """The update itself is rounded to bfloat16, to 2^-8 of it."""
    cls, shapes, options = RULES[rule]
    params = parameters(shapes, torch.bfloat16)
    optimizer = cls(params, **options, rounding=kept, seed=3)
    zeros = [zeros_of(optimizer, p) for p in params]
    old = [p.detach().clone() for p in params]
    with implementation.active():
        train(optimizer, params, 1, first=1)
    for i, (param, before, states) in enumerate(zip(params, old, zeros, strict=True)):
        exact, _ = expected(cls, before, param.grad, states, 1, options, torch.float64)
        update = (exact - before.double() * (1 - options["lr"] * options["weight_decay"])).abs()
        error = (master(optimizer, param).double() - exact).abs()
        if kept == "remainder":
            assert (error <= update * 2**-8 + 1e-6 * before.double().abs() + 1e-6).all(), i
        else:
            unit = 2.0 ** (torch.frexp(exact)[1] - 8)  # of bfloat16 at the value
            assert (error <= update * 2**-8 + unit + 1e-6).all(), i
            fine = update * 2**-8 <= unit  # there the errors, independent, deviate by less than a unit
            mean = ((param.detach().double() - exact) / unit)[fine].sum() / max(1, int(fine.sum()))
            assert mean.abs() <= 4 / max(1, int(fine.sum())) ** 0.5, i


@pytest.mark.parametrize("options", [{}, {"nesterov": False, "adjust_lr_fn": "match_rms_adamw"}], ids=str)
def test_muon_with_products_in_bfloat16_is_that_of_torch_and_checkpoints_go_both_ways(options, monkeypatch):
    monkeypatch.setattr(muon, "_PRODUCTS", {})
    ours, plain = parameters(MATRICES), parameters(MATRICES)
    exact, states = [p.detach().double() for p in plain], [{"momentum_buffer": torch.zeros(p.shape)} for p in plain]
    numbers = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95} | options
    for step in range(7):
        for i, p in enumerate(plain):
            grad = normal(p.shape, 100 * step + i).bfloat16()
            exact[i], states[i] = expected(optim.Muon, exact[i], grad, states[i], step, numbers, torch.float64)
    mine, torchs = optim.Muon(ours, lr=0.02, **options), torch.optim.Muon(plain, lr=0.02, **options)
    for optimizer, params in ((mine, ours), (torchs, plain)):
        train(optimizer, params, 5)
    saved = copy.deepcopy(mine.state_dict())
    mine.load_state_dict(copy.deepcopy(torchs.state_dict()))
    torchs.load_state_dict(saved)
    for optimizer, params in ((mine, ours), (torchs, plain)):
        train(optimizer, params, 2, first=5)
    for i, triple in enumerate(zip(ours, exact, plain, strict=True)):
        assert_within_factor_two(f"parameter {i}", *(p.detach() for p in triple))


@on_every_implementation
@pytest.mark.parametrize("options", [{"weight_decay": 0.1}, {"d": 2.0, "maximize": True}], ids=str)
def test_twenty_steps_of_adafactor_are_those_of_torch_and_its_checkpoints_load(implementation, options):
    options, shapes = options | {"lr": 0.1, "eps": (1e-7, 1e-3)}, SHAPES[:4]
    ours, plain = parameters(shapes), parameters(shapes)
    exact = [torch.nn.Parameter(p.detach().double()) for p in plain]
    mine = optim.Adafactor(ours, **options)
    theirs, oracle = torch.optim.Adafactor(plain, **options), torch.optim.Adafactor(exact, **options)
    with implementation.active():
        for optimizer, params in ((mine, ours), (theirs, plain), (oracle, exact)):
            train(optimizer, params, 10)
        mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
        for optimizer, params in ((mine, ours), (theirs, plain), (oracle, exact)):
            train(optimizer, params, 10, first=10)
    for i, triple in enumerate(zip(ours, exact, plain, strict=True)):
        assert_within_factor_two(f"parameter {i}", *(p.detach() for p in triple), atol=1e-6)


def test_muon_makes_rows_or_columns_orthonormal():
    for shape in ((32, 8), (8, 32)):
        values = torch.linalg.svdvals(muon.orthogonal(normal(shape, 1), (3.4445, -4.7750, 2.0315), 5, 1e-7))
        assert (values > 0.6).all() and (values < 1.3).all()
    zero = muon.orthogonal(torch.zeros(3, 3), (3.4445, -4.7750, 2.0315), 5, 1e-7)
    assert (zero == 0).all()


@every_rule
def test_clipping_scale_and_direction_are_folded_in(rule):
    cls, shapes, options = RULES[rule]
    by_hand, folded, up = (parameters(shapes) for _ in range(3))
    for i, param in enumerate(by_hand):
        param.grad = normal(param.shape, i)
    norm = torch.nn.utils.clip_grad_norm_(by_hand, 0.5)
    for i, (clipped, large, opposite) in enumerate(zip(by_hand, folded, up, strict=True)):
        large.grad, opposite.grad = normal(large.shape, i) * 1024, -clipped.grad
    optimizers = cls(by_hand, **options), cls(folded, **options), cls(up, **options, maximize=True)
    optimizers[0].step()
    optimizers[1].step(max_norm=0.5, loss_scale=1024.0)
    optimizers[2].step()
    torch.testing.assert_close(optimizers[1].grad_norm, norm, rtol=1e-5, atol=0)
    for a, b, c in zip(by_hand, folded, up, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(c, a, rtol=1e-6, atol=1e-7)


@every_rule
@every_width
def test_state_dict_goes_on_bit_for_bit(rule, bits):
    cls, shapes, options = RULES[rule]
    params = parameters(shapes, torch.bfloat16)
    optimizer = cls(params, **options, state_bits=bits, rounding="remainder")
    train(optimizer, params, 2)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    again = cls(copies, **options, state_bits=bits, rounding="remainder")
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, of in ((optimizer, params), (again, copies)):
        train(one, of, 2, first=2)
    assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))


@every_rule
def test_a_parameter_of_any_strides_is_stepped(rule):
    cls, _, options = RULES[rule]
    dense, strided = (
        torch.nn.Parameter(normal((24, 16), 0)),
        torch.nn.Parameter(normal((24, 16), 0).t().contiguous().t()),
    )
    assert not strided.is_contiguous()
    for param in (dense, strided):
        optimizer = cls([param], **options)
        param.grad = normal((24, 16), 1)
        version = param._version
        optimizer.step()
        assert param._version > version
    assert torch.equal(dense, strided)


@pytest.mark.parametrize(
    ("cls", "options", "expected_bytes"),
    [
        (optim.Muon, {"state_bits": 8}, 256 * 512 * (1 + 4 / 256)),
        (optim.Adafactor, {}, 4 * (256 + 512)),
        (optim.Adafactor, {"beta1": 0.9, "state_bits": 4}, 4 * (256 + 512) + 256 * 512 * (0.5 + 4 / 128)),
    ],
    ids=["muon", "adafactor", "adafactor moment"],
)
def test_bytes_of_state(cls, options, expected_bytes):
    param = torch.nn.Parameter(torch.ones(256, 512))
    optimizer = cls([param], **options)
    param.grad = torch.ones_like(param)
    optimizer.step()
    held = sum(value.untyped_storage().nbytes() for key, value in optimizer.state[param].items() if key != "step")
    assert held == expected_bytes


def test_they_step_within_backward():
    for cls, options in ((optim.Muon, MUON), (optim.Adafactor, ADAFACTOR)):
        apart, within = (torch.nn.Linear(8, 6, bias=False) for _ in range(2))
        within.load_state_dict(apart.state_dict())
        optimizer, stepper = cls(apart.parameters(), **options), optim.step_in_backward(within, cls, **options)
        x = normal((5, 8), 0)
        apart(x).square().sum().backward()
        optimizer.step()
        stepper.backward(within(x).square().sum())
        assert torch.equal(apart.weight, within.weight) and within.weight.grad is None


@pytest.mark.parametrize(
    ("cls", "options", "error"),
    [
        (optim.Muon, {"ns_steps": 100}, "ns_steps: expected an integer from 0 to 99"),
        (optim.Muon, {"ns_coefficients": (1, 2)}, "ns_coefficients: expected three numbers"),
        (optim.Muon, {"ns_coefficients": (1, 2, "c")}, "ns_coefficients: expected a number"),
        (optim.Muon, {"nesterov": 1}, "nesterov: expected True or False, got 1"),
        (optim.Muon, {"state_bits": 8.0}, "state_bits: expected one of"),
        (optim.Muon, {"adjust_lr_fn": "mine"}, "adjust_lr_fn: expected one of"),
        (optim.Muon, {"momentum": -1}, "momentum: expected a number from 0"),
        (optim.Adafactor, {"beta2_decay": 0.5}, "beta2_decay: expected a number from"),
        (optim.Adafactor, {"eps": 1e-3}, "eps: expected two numbers"),
        (optim.Adafactor, {"d": 0.5}, "d: expected a number from 1"),
        (optim.Adafactor, {"beta1": 1.0}, "beta1: expected a number from 0"),
        (optim.Adafactor, {"state_bits": 7}, "state_bits: expected one of"),
    ],
)
def test_bad_options_are_named(cls, options, error):
    with pytest.raises((TypeError, ValueError), match=error):
        cls([torch.nn.Parameter(torch.ones(2, 2))], **options)


def test_muon_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match=r"params\[1\]: expected a matrix, got shape \(3,\); AdamW is for others"):
        optim.Muon([torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(3))])
