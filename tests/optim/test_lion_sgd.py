"""optim.Lion and optim.SGD: every instruction set and width against float64, and SGD against torch's own."""

import copy

import pytest
import torch
from optimizer_steps import master, normal

from memkernels import optim
from memkernels.optim import codes, reference, rounding
from memkernels.testing import assert_within_factor_two, implementations

on_every_implementation = pytest.mark.parametrize("implementation", implementations("sgd_"), ids=str)
every_width = pytest.mark.parametrize("bits", [32, 16, 8, 4])
SHAPES = ((300, 7), (), (0,), (257,), (6000,))
LION = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}
RULES = [
    (optim.Lion, reference.lion, LION, {"lr": 1e-2, "beta1": 0.8, "beta2": 0.95, "weight_decay": 0.1}),
    *(
        (optim.SGD, reference.sgd, options, options)
        for options in (
            {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1, "nesterov": False},
            {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0, "nesterov": True},
            {"lr": 0.1, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.1, "nesterov": False},
        )
    ),
]


def parameters(dtype=torch.float32):
    return [torch.nn.Parameter(normal(shape, i, dtype)) for i, shape in enumerate(SHAPES)]


def train(optimizer, params, steps, first=0):
    for step in range(first, first + steps):
        for i, param in enumerate(params):
            param.grad = normal(param.shape, 100 * step + i).bfloat16().to(param.dtype)
        optimizer.step()


@on_every_implementation
@every_width
@pytest.mark.parametrize("kept", ["float32", "stochastic", "remainder"])
@pytest.mark.parametrize("rule", RULES, ids=["lion", "dampened", "nesterov", "plain"])
def test_one_step_against_float64(implementation, rule, bits, kept):
    cls, update, options, numbers = rule
    params = parameters(torch.float32 if kept == "float32" else torch.bfloat16)
    rounds = "remainder" if kept == "remainder" else "stochastic"
    optimizer = cls(params, **options, state_bits=bits, rounding=rounds, seed=7)
    for step in (1, 2):
        old = [master(optimizer, p).clone() for p in params]
        states = [copy.deepcopy(optimizer.state[p]) for p in params]
        with implementation.active():
            train(optimizer, params, 1, first=step)
        for i, (param, before, state) in enumerate(zip(params, old, states, strict=True)):
            moments = optimizer.moments(optimizer.param_groups[0])
            values = [
                codes.decode(state[key], state.get(f"{key}_absmax"), bits, True, param.shape)
                if key in state
                else torch.zeros(param.shape)
                for key, _ in moments
            ]
            arguments = (before.float(), param.grad.float(), *values)
            exact = update(*(a.double() for a in arguments), step=step, **numbers)
            plain = update(*arguments, step=step, **numbers)
            if kept == "stochastic":
                assert_same_choice(param.detach(), plain[0], before, 0, i, step)
            elif cls is optim.SGD:
                assert_within_factor_two(f"parameter {i}", master(optimizer, param), exact[0], plain[0])
            else:  # a direction whose terms cancel may round to either sign
                m, g = values[0].double(), param.grad.double()
                decided = (m + 0.2 * (g - m)).abs() > 1e-6 * (m.abs() + g.abs())
                assert decided.sum() >= 0.99 * decided.numel()
                pick = (x[decided] for x in (master(optimizer, param), exact[0], plain[0]))
                assert_within_factor_two(f"parameter {i}", *pick)
            for k, (key, _) in enumerate(moments):
                stored, absmax = optimizer.state[param][key], optimizer.state[param].get(f"{key}_absmax")
                if bits == 32:
                    assert_within_factor_two(f"{key} {i}", stored, exact[1 + k], plain[1 + k])
                elif bits == 16:
                    assert_same_choice(stored, plain[1 + k], values[k], 1 + k, i, step)
                else:
                    actual = codes.decode(stored, absmax, bits, True, param.shape)
                    nearest = codes.decode(*codes.encode(plain[1 + k], bits, True), bits, True, param.shape)
                    error, least = ((x - exact[1 + k]).abs() for x in (actual, nearest))
                    assert (error <= least + 1e-5 * exact[1 + k].abs()).all()


def assert_same_choice(actual, plain, before, tensor, index, step):
    """As in test_adamw."""
    random = rounding.random_bits(plain.numel(), 7, tensor, index, step, plain.device).view(plain.shape)
    cancelled = plain.abs() < 1e-2 * before.abs()
    assert ((actual != rounding.round_stochastic(plain, random)) & ~cancelled).sum() <= 1 + 1e-3 * actual.numel()


@on_every_implementation
@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True},
        {"lr": torch.tensor(0.1)},
    ],
    ids=str,
)
def test_twenty_steps_of_sgd_are_those_of_torch_and_its_checkpoints_load(implementation, options):
    ours, plain, exact = parameters(), parameters(), [torch.nn.Parameter(p.detach().double()) for p in parameters()]
    mine, theirs, oracle = (
        optim.SGD(ours, **options),
        torch.optim.SGD(plain, **options),
        torch.optim.SGD(exact, **options),
    )
    with implementation.active():
        for optimizer, params in ((mine, ours), (theirs, plain), (oracle, exact)):
            train(optimizer, params, 10)
        saved = copy.deepcopy(mine.state_dict())
        mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
        for a, b in zip(ours, plain, strict=True):
            a.data, b.data = b.data.clone(), a.data.clone()
        theirs.load_state_dict(saved)
        for optimizer, params in ((mine, ours), (theirs, plain), (oracle, exact)):
            train(optimizer, params, 10, first=10)
    for i, triple in enumerate(zip(ours, exact, plain, strict=True)):
        assert_within_factor_two(f"parameter {i}", *(p.detach() for p in triple))


@pytest.mark.parametrize(("cls", "options"), [(optim.Lion, LION), (optim.SGD, {"lr": 0.1, "momentum": 0.9})])
@every_width
def test_state_dict_goes_on_bit_for_bit(cls, options, bits):
    params = parameters(torch.bfloat16)
    optimizer = cls(params, **options, state_bits=bits)
    train(optimizer, params, 2)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    again = cls(copies, **options, state_bits=bits)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, of in ((optimizer, params), (again, copies)):
        train(one, of, 2, first=2)
    assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))


@pytest.mark.parametrize(("bits", "expected"), [(32, 4), (16, 2), (8, 1 + 4 / 256), (4, 0.5 + 4 / 128)])
def test_bytes_of_state_for_each_parameter(bits, expected):
    for cls, options in ((optim.Lion, {}), (optim.SGD, {"momentum": 0.9})):
        param = torch.nn.Parameter(torch.ones(1 << 16))
        optimizer = cls([param], **options, state_bits=bits)
        param.grad = torch.ones_like(param)
        optimizer.step()
        held = sum(v.untyped_storage().nbytes() for key, v in optimizer.state[param].items() if key != "step")
        assert held == expected * param.numel()


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (optim.Lion, {"lr": -1.0}, "lr: expected"),
        (optim.Lion, {"betas": (0.9, 1.0)}, "betas: expected"),
        (optim.Lion, {"state_bits": 2}, "state_bits: expected"),
        (optim.SGD, {"momentum": -0.1}, "momentum: expected"),
        (optim.SGD, {"dampening": 2.0}, "dampening: expected"),
        (optim.SGD, {"nesterov": True}, "nesterov: expected momentum above 0"),
        (optim.SGD, {"nesterov": None}, "nesterov: expected True or False, got None"),
    ],
)
def test_bad_options_are_named(cls, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        cls([torch.nn.Parameter(torch.ones(3))], **options)


def test_a_checkpoint_of_another_optimizer_is_refused():
    params = parameters()
    optimizer, other = optim.SGD(params, momentum=0.9), torch.optim.AdamW(params)
    train(other, params, 1)
    with pytest.raises(ValueError, match=r"param_groups\[0\]: expected dampening, momentum, nesterov"):
        optimizer.load_state_dict(other.state_dict())
    lion, adam = optim.Lion(params), torch.optim.Adam(params, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"state\[0\]: expected no 'exp_avg_sq'; a checkpoint of another optimizer"):
        lion.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"param_groups\[0\]: a weight decay within the gradient, as torch.optim.Adam"):
        optim.AdamW(params).load_state_dict(adam.state_dict())


@pytest.mark.parametrize("operator", ["lion_", "sgd_"])
def test_operators_pass_opcheck(operator):
    param, moment = torch.ones(300), torch.zeros(300)
    last = (0.9, 0.99, 0.0) if operator == "lion_" else (0.9, 0.0, 0.0, False)
    arguments = ([param], [torch.ones(300)], [moment], [], [], [1], [0], [0], 0, 32, 1.0, None, None, 0.1, *last)
    torch.library.opcheck(getattr(torch.ops.memkernels, operator).default, arguments)
