"""optim.AdamW: every instruction set and storage against float64 and torch's own AdamW; what its results depend on."""

import copy
import functools
from unittest import mock

import pytest
import torch
from optimizer_steps import OPTIONS, master, normal, parameters, train

from memkernels import optim
from memkernels.optim import codes, operators, reference, rounding
from memkernels.testing import assert_within_factor_two, implementations

IMPLEMENTATIONS = implementations("adamw_")
on_every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
every_width = pytest.mark.parametrize("bits", [32, 16, 8, 4])
NUMBERS = {"lr": 3e-2, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.1}


@on_every_implementation
@pytest.mark.parametrize("options", [{}, {"maximize": True, "weight_decay": 0.0}, {"lr": torch.tensor(0.01)}], ids=str)
def test_twenty_steps_are_those_of_torch(implementation, options):
    ours, plain, exact = parameters(), parameters(), parameters(torch.float64)
    optimizers = [
        optim.AdamW(ours, **OPTIONS | options),
        torch.optim.AdamW(plain, **OPTIONS | options, foreach=False),
        torch.optim.AdamW(exact, **OPTIONS | options, foreach=False),
    ]
    with implementation.active():
        for optimizer, params in zip(optimizers, (ours, plain, exact), strict=True):
            train(optimizer, params)
    for i, triple in enumerate(zip(ours, exact, plain, strict=True)):
        assert_within_factor_two(f"parameter {i}", *(p.detach() for p in triple))
        for key in ("exp_avg", "exp_avg_sq"):
            states = (optimizers[k].state[p][key] for k, p in zip((0, 2, 1), triple, strict=True))
            assert_within_factor_two(f"{key} {i}", *states, atol=1e-7)


@functools.cache
def twenty_steps_in_plain_pytorch(bits):
    """By the reference, with the same codes and random bits; and in float64."""
    plain, exact = parameters(), parameters(torch.float64)
    with mock.patch.object(operators, "has_kernel", lambda *_: False):
        train(optim.AdamW(plain, **OPTIONS, state_bits=bits), plain)
    train(torch.optim.AdamW(exact, **OPTIONS), exact)
    return plain, exact


@on_every_implementation
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_twenty_steps_in_few_bits_are_as_near_to_float64_as_plain_pytorch(implementation, bits):
    ours, (plain, exact) = parameters(), twenty_steps_in_plain_pytorch(bits)
    with implementation.active():
        train(optim.AdamW(ours, **OPTIONS, state_bits=bits), ours)
    for i, triple in enumerate(zip(ours, exact, plain, strict=True)):
        assert_within_factor_two(f"parameter {i}", *(p.detach() for p in triple))


@on_every_implementation
@every_width
@pytest.mark.parametrize("kept", ["float32", "stochastic", "remainder"])
def test_one_step_against_float64(implementation, bits, kept):
    """From the same states: parameters by the factor-two rule, or the random bits' choice; moments likewise, or the
    nearest code."""
    dtype = torch.float32 if kept == "float32" else torch.bfloat16
    rounds = "remainder" if kept == "remainder" else "stochastic"
    params = parameters(dtype)
    optimizer = optim.AdamW(params, **OPTIONS, state_bits=bits, rounding=rounds, seed=7)
    with implementation.active():
        train(optimizer, params, 3)
        before = [(master(optimizer, p), copy.deepcopy(optimizer.state[p])) for p in params]
        train(optimizer, params, 1, first=3)
    for i, (param, (old, state)) in enumerate(zip(params, before, strict=True)):
        value = master(optimizer, param)
        old_moments = [
            codes.decode(state[key], state.get(f"{key}_absmax"), bits, signed, param.shape)
            for key, signed in optimizer.moments({})
        ]
        arguments = (old.float(), param.grad.float(), *old_moments)
        exact = reference.adamw(*(a.double() for a in arguments), step=4, **NUMBERS)
        plain = reference.adamw(*arguments, step=4, **NUMBERS)
        if kept == "stochastic":
            assert_same_choice(value, plain[0], exact[0], old, 0, i)
        else:
            assert_within_factor_two(f"parameter {i}", value, exact[0], plain[0])
        for k, (key, signed) in enumerate(optimizer.moments({})):
            stored, absmax = optimizer.state[param][key], optimizer.state[param].get(f"{key}_absmax")
            if bits == 32:
                assert_within_factor_two(f"{key} {i}", stored, exact[1 + k], plain[1 + k], atol=1e-7)
            elif bits == 16:
                assert_same_choice(stored, plain[1 + k], exact[1 + k], old_moments[k], 1 + k, i)
            else:
                actual = codes.decode(stored, absmax, bits, signed, param.shape)
                nearest = codes.decode(*codes.encode(plain[1 + k], bits, signed), bits, signed, param.shape)
                error, least = ((x - exact[1 + k]).abs() for x in (actual, nearest))
                assert (error <= least + 1e-5 * exact[1 + k].abs()).all(), (key, i)


def assert_same_choice(actual, plain, exact, before, tensor, index):
    """The reference's choice for the same random bits; another is as likely as a carry out of float32's rounding, but
    where terms cancel, whose rounding is larger."""
    random = rounding.random_bits(plain.numel(), 7, tensor, index, 4, plain.device).view(plain.shape)
    expected = rounding.round_stochastic(plain, random)
    cancelled = exact.abs() < 1e-2 * before.abs()
    assert ((actual != expected) & ~cancelled).sum() <= 1 + 1e-3 * actual.numel()
    assert ((actual.double() - exact).abs() <= exact.abs() * 2**-7 + 1e-6 * before.abs()).all()


@on_every_implementation
@every_width
def test_a_master_weight_in_two_halves_is_the_float32_weight(implementation, bits):
    halves, whole = (
        parameters(torch.bfloat16),
        [torch.nn.Parameter(p.detach().float()) for p in parameters(torch.bfloat16)],
    )
    split, single = (
        optim.AdamW(halves, **OPTIONS, state_bits=bits, rounding="remainder"),
        optim.AdamW(whole, **OPTIONS, state_bits=bits),
    )
    with implementation.active():
        train(split, halves)
        train(single, whole)
    for half, weight in zip(halves, whole, strict=True):
        assert torch.equal(master(split, half), weight)
        nearest = weight.detach().bfloat16()
        assert ((half - nearest).float().abs() <= nearest.float().abs() * 2**-7).all()
        assert ((half != nearest).sum() <= 1 + half.numel() / 1000).item()  # ties alone


@on_every_implementation
def test_stochastic_rounding_keeps_the_mean(implementation):
    """Steps of a sixteenth of bfloat16's last place, which rounding to nearest would lose."""
    size, steps = 1 << 16, 8
    param = torch.nn.Parameter(torch.full((size,), 1.0, dtype=torch.bfloat16))
    optimizer = optim.AdamW([param], lr=2**-11, eps=0.0, weight_decay=0.0)
    with implementation.active():
        for _ in range(steps):
            param.grad = torch.ones_like(param)
            optimizer.step()
    # Below 1 the last place is 2^-8: a mean of `size` values, each a sum of steps with variance below (2^-8)^2 / 4.
    deviation = 2**-9 * (steps / size) ** 0.5
    assert abs(param.detach().double().mean().item() - (1 - steps * 2**-11)) < 5 * deviation
    assert set(param.unique().tolist()) <= {1 - k * 2**-8 for k in range(steps + 1)}


def test_random_bits_depend_on_seed_step_and_parameter():
    def result(seed, steps=1, others=0):
        params = [torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)) for _ in range(others + 1)]
        optimizer = optim.AdamW(params, lr=1e-3, seed=seed)
        for _ in range(steps):
            params[-1].grad = torch.ones_like(params[-1])
            optimizer.step()
        return params[-1].detach()

    assert torch.equal(result(1), result(1))
    assert not torch.equal(result(1), result(2)) and not torch.equal(result(1), result(1, others=1))
    assert not torch.equal(result(1) != 1, result(1, steps=2) != result(1))


@every_width
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_threads_or_on_other_parameters(bits, dtype):
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        params = parameters(dtype, ((70003,), (40000,)))
        train(optim.AdamW(params, **OPTIONS, state_bits=bits), params, 2)
        results.append(torch.cat([p.detach() for p in params]))
    torch.set_num_threads(threads)
    alone = parameters(dtype, ((70003,),))
    train(optim.AdamW(alone, **OPTIONS, state_bits=bits), alone, 2)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert torch.equal(results[0][:70003], alone[0])


@on_every_implementation
@pytest.mark.parametrize(("bits", "cut"), [(32, 77), (16, 2304), (16, 77), (16, 40001), (8, 2304), (4, 2304)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_parameter_that_is_cut_has_the_same_values_and_states(implementation, bits, cut, dtype):
    """By a part of it alone, in the whole one's place, random bits included: anywhere, but for blocks between them."""
    size = 75000
    whole = torch.nn.Parameter(normal(size, 0, dtype))
    parts = [torch.nn.Parameter(part.clone()) for part in whole.detach().split([cut, size - cut])]
    optimizers = [optim.AdamW([param], **OPTIONS, state_bits=bits) for param in (whole, *parts)]
    optimizers[2].origins[parts[1]] = cut
    with implementation.active():
        for step in range(3):
            whole.grad = normal(size, 100 + step, dtype)
            for part, grad in zip(parts, whole.grad.split([cut, size - cut]), strict=True):
                part.grad = grad
            for optimizer in optimizers:
                optimizer.step()
    assert torch.equal(torch.cat([p.detach() for p in parts]), whole)
    for key, value in optimizers[0].state[whole].items():
        if key != "step":
            assert torch.equal(torch.cat([o.state[p][key] for o, p in zip(optimizers[1:], parts, strict=True)]), value)


@pytest.mark.parametrize("kept", ["float32", "stochastic", "remainder"])
@every_width
def test_strided_parameters_and_gradients(bits, kept):
    dtype = torch.float32 if kept == "float32" else torch.bfloat16
    rounds = "remainder" if kept == "remainder" else "stochastic"
    values = normal((60, 44), 0, dtype)
    dense = torch.nn.Parameter(values.clone())
    strided = torch.nn.Parameter(values.t().contiguous().t())
    gapped = torch.nn.Parameter(torch.zeros(60, 88, dtype=dtype)[:, ::2].copy_(values))
    for param in (dense, strided, gapped):
        optimizer = optim.AdamW([param], **OPTIONS, state_bits=bits, rounding=rounds)
        for step in range(3):
            grad = normal((60, 44), 10 + step, dtype)
            param.grad = grad if param is gapped else torch.empty_like(param).copy_(grad)
            kept_grad = param.grad.clone()
            optimizer.step()
            assert torch.equal(param.grad, kept_grad)
    assert not torch.equal(dense, values)
    assert torch.equal(strided, dense) and torch.equal(gapped, dense) and not strided.is_contiguous()


@pytest.mark.parametrize(("bits", "expected"), [(32, 8), (16, 4), (8, 2 + 8 / 256), (4, 1 + 8 / 128)])
def test_bytes_of_state_for_each_parameter(bits, expected):
    param = torch.nn.Parameter(torch.ones(1 << 16))
    optimizer = optim.AdamW([param], state_bits=bits)
    param.grad = torch.ones_like(param)
    optimizer.step()
    held = sum(value.untyped_storage().nbytes() for key, value in optimizer.state[param].items() if key != "step")
    assert held == expected * param.numel()
