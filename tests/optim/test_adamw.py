"""optim.AdamW: every instruction set and storage against float64, torch's own AdamW, and checkpoints both ways."""

import copy
import functools
import io
from unittest import mock

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from memkernels import optim, quant
from memkernels.optim import codes, operators, reference, rounding
from memkernels.testing import assert_within_factor_two, implementations

IMPLEMENTATIONS = implementations("adamw_")
on_every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
every_width = pytest.mark.parametrize("bits", [32, 16, 8, 4])
SHAPES = ((300, 7), (), (1,), (0,), (255,), (256,), (3, 5, 67), (6000,))
OPTIONS = {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
NUMBERS = {"lr": 3e-2, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.1}


def normal(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameters(dtype=torch.float32, shapes=SHAPES):
    return [torch.nn.Parameter(normal(shape, i, dtype)) for i, shape in enumerate(shapes)]


def set_gradients(params, step):
    """The same at a step for every optimizer, of a size that varies over elements, rounded to bfloat16."""
    for i, param in enumerate(params):
        scale = 10 ** normal(param.shape, 1000 + i)
        param.grad = (scale * normal(param.shape, 2000 + 100 * step + i)).bfloat16().to(param.dtype)


def train(optimizer, params, steps=20, first=0):
    for step in range(first, first + steps):
        set_gradients(params, step)
        optimizer.step()


def masters(optimizer, params):
    """Parameters with all the bits there are of them."""
    return [
        rounding.join(p.detach(), optimizer.state[p]["remainder"]) if "remainder" in optimizer.state[p] else p.detach()
        for p in params
    ]


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
        before = [
            (value.clone(), copy.deepcopy(optimizer.state[p]))
            for p, value in zip(params, masters(optimizer, params), strict=True)
        ]
        train(optimizer, params, 1, first=3)
    for i, (param, value, (old, state)) in enumerate(zip(params, masters(optimizer, params), before, strict=True)):
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
    for half, master, weight in zip(halves, masters(split, halves), whole, strict=True):
        assert torch.equal(master, weight)
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
@every_width
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_parameter_cut_at_a_block_has_the_same_values_and_states(implementation, bits, dtype):
    """By a part of it alone, in the whole one's place, random bits included."""
    whole = torch.nn.Parameter(normal(5000, 0, dtype))
    parts = [torch.nn.Parameter(part.clone()) for part in whole.detach().split([2304, 2696])]
    optimizers = [optim.AdamW([param], **OPTIONS, state_bits=bits) for param in (whole, *parts)]
    optimizers[2].origins[parts[1]] = 2304
    with implementation.active():
        for step in range(3):
            whole.grad = normal(5000, 100 + step, dtype)
            for part, grad in zip(parts, whole.grad.split([2304, 2696]), strict=True):
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


@pytest.mark.parametrize("kept", ["float32", "stochastic", "remainder"])
@every_width
def test_state_dict_goes_on_bit_for_bit(bits, kept):
    dtype = torch.float32 if kept == "float32" else torch.bfloat16
    options = OPTIONS | {"state_bits": bits, "rounding": "remainder" if kept == "remainder" else "stochastic"}
    params = parameters(dtype)
    optimizer = optim.AdamW(params, **options, seed=3)
    train(optimizer, params, 3)
    stream = io.BytesIO()
    torch.save([optimizer.state_dict(), params], stream)
    stream.seek(0)
    saved, copies = torch.load(stream, weights_only=True)
    again = optim.AdamW(copies, **options | {"lr": 1.0}, seed=3)
    again.load_state_dict(saved)
    assert again.param_groups[0]["lr"] == OPTIONS["lr"]
    train(optimizer, params, 2, first=3)
    train(again, copies, 2, first=3)
    assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))
    for a, b in zip(params, copies, strict=True):
        assert optimizer.state[a].keys() == again.state[b].keys()
        assert all(torch.equal(value, again.state[b][key]) for key, value in optimizer.state[a].items())
    assert all(saved["state"][i]["step"] == 3 for i in saved["state"])  # a copy was loaded


@pytest.mark.parametrize("fused", [False, True])
def test_checkpoints_to_and_from_torch(fused):
    mine, theirs = parameters(shapes=SHAPES[:3]), parameters(shapes=SHAPES[:3])
    ours, torchs = optim.AdamW(mine, **OPTIONS), torch.optim.AdamW(theirs, **OPTIONS | {"lr": 1.0}, fused=fused)
    train(ours, mine, 3)
    torchs.load_state_dict(copy.deepcopy(ours.state_dict()))
    for a, b in zip(mine, theirs, strict=True):
        assert all(torch.equal(ours.state[a][key], torchs.state[b][key]) for key in ("step", "exp_avg", "exp_avg_sq"))
        b.data.copy_(a)
    train(torchs, theirs, 2, first=3)
    back = optim.AdamW([torch.nn.Parameter(p.detach().clone()) for p in theirs])
    back.load_state_dict(torchs.state_dict())
    copies = back.param_groups[0]["params"]
    train(ours, mine, 2, first=3)
    assert back.param_groups[0]["weight_decay"] == OPTIONS["weight_decay"]
    for a, b, c in zip(mine, theirs, copies, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert all(torch.equal(back.state[c][key], torchs.state[b][key]) for key in ("exp_avg", "exp_avg_sq"))
    train(back, copies, 1, first=5)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("saved_bits", [32, 8])
def test_a_checkpoint_of_another_width_is_converted(saved_bits, bits):
    params = parameters()
    optimizer = optim.AdamW(params, **OPTIONS, state_bits=saved_bits)
    train(optimizer, params, 2)
    other = optim.AdamW(parameters(), state_bits=bits)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["state_bits"] == bits
    for a, b in zip(params, other.param_groups[0]["params"], strict=True):
        for key, signed in optimizer.moments({}):
            old, new = optimizer.state[a], other.state[b]
            values = codes.decode(old[key], old.get(f"{key}_absmax"), saved_bits, signed, a.shape)
            expected, absmax = (
                (new[key], new.get(f"{key}_absmax")) if bits == saved_bits else codes.encode(values, bits, signed)
            )
            assert torch.equal(new[key], expected) and (absmax is None or torch.equal(new[f"{key}_absmax"], absmax))
    train(other, other.param_groups[0]["params"], 1)


@pytest.mark.parametrize(("bits", "expected"), [(32, 8), (16, 4), (8, 2 + 8 / 256), (4, 1 + 8 / 128)])
def test_bytes_of_state_for_each_parameter(bits, expected):
    param = torch.nn.Parameter(torch.ones(1 << 16))
    optimizer = optim.AdamW([param], state_bits=bits)
    param.grad = torch.ones_like(param)
    optimizer.step()
    held = sum(value.untyped_storage().nbytes() for key, value in optimizer.state[param].items() if key != "step")
    assert held == expected * param.numel()


def test_mixed_dtypes_groups_schedulers_and_missing_gradients():
    params = [*parameters(shapes=((100, 3), (50,))), *parameters(torch.bfloat16, ((64, 3), (9,)))]
    groups = [{"params": params[::2], "lr": 0.1}, {"params": params[1:2], "state_bits": 8, "weight_decay": 0.0}]
    optimizer = optim.AdamW(groups, lr=0.2)
    optimizer.add_param_group({"params": params[3:], "rounding": "remainder"})
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    set_gradients(params, 0)
    params[0].grad = None
    before = [p.detach().clone() for p in params]
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.1, 0.1]
    assert torch.equal(params[0], before[0]) and params[0] not in optimizer.state
    assert all(not torch.equal(a, b) for a, b in zip(params[1:], before[1:], strict=True))
    # A first step without decay is lr in the gradient's direction.
    torch.testing.assert_close(params[1].detach(), before[1] - 0.2 * params[1].grad.sign(), rtol=0, atol=1e-4)
    assert optimizer.state[params[1]]["exp_avg"].dtype == torch.uint8 and "remainder" in optimizer.state[params[3]]


@pytest.mark.parametrize("bits", [32, 8, 4])  # states of 16 are rounded by the parameter's place in the optimizer
def test_both_dtypes_in_one_group_are_as_each_by_itself(bits):
    shapes = ((300, 7), (255,))
    options = OPTIONS | {"state_bits": bits, "rounding": "remainder"}
    together = [*parameters(shapes=shapes), *parameters(torch.bfloat16, shapes)]
    apart = [parameters(shapes=shapes), parameters(torch.bfloat16, shapes)]
    optimizers = [optim.AdamW(params, **options) for params in (together, *apart)]
    for step in range(3):
        for params in apart:
            set_gradients(params, step)
        for param, other in zip(together, [*apart[0], *apart[1]], strict=True):
            param.grad = other.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(together, [*apart[0], *apart[1]], strict=True))
    assert ["remainder" in optimizers[0].state[param] for param in together] == [False, False, True, True]


def test_clipping_and_scaling_are_folded_into_the_step():
    ours, expected = parameters(), parameters()
    folded, plain = optim.AdamW(ours, **OPTIONS), optim.AdamW(expected, **OPTIONS)
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(expected, step)
        for param in ours:
            param.grad *= 1024.0
        folded.step(max_norm=0.5, loss_scale=1024.0)
        norm = torch.cat([param.grad.double().view(-1) for param in expected]).norm()
        torch.testing.assert_close(folded.grad_norm.double(), norm, rtol=1e-6, atol=0)
        torch.nn.utils.clip_grad_norm_(expected, 0.5)
        plain.step()
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_closure_computes_the_gradients_of_the_step():
    param = torch.nn.Parameter(torch.ones(5))
    optimizer = optim.AdamW([param], lr=0.1, weight_decay=0.0)

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 5
    torch.testing.assert_close(param.detach(), torch.full((5,), 0.9))


def test_grad_scaler_hands_over_its_scale_and_skips():
    param = torch.nn.Parameter(torch.ones(5))
    optimizer, scaler = optim.AdamW([param], lr=0.1, weight_decay=0.0), torch.amp.GradScaler("cpu", init_scale=512.0)
    scaler.scale(param.square().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(optimizer.state[param]["exp_avg"], torch.full((5,), 0.2))
    param.grad.fill_(torch.inf)
    before = param.detach().clone()
    scaler.step(optimizer)
    assert torch.equal(param, before) and optimizer.state[param]["step"] == 1


def test_a_step_is_seen_by_autograd():
    param = torch.nn.Parameter(torch.ones(5))
    loss = (param * param).sum()
    param.grad = torch.ones(5)
    optim.AdamW([param]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


BAD = [
    ({"state_bits": 7}, ValueError, r"state_bits: expected one of \(32, 16, 8, 4\), got 7"),
    ({"rounding": "nearest"}, ValueError, "rounding: expected one of"),
    ({"seed": 1.5}, ValueError, "seed: expected an integer of 64 bits"),
    ({"lr": -1.0}, ValueError, "lr: expected a number from 0"),
    ({"lr": "big"}, TypeError, "lr: expected a number, got str"),
    ({"lr": torch.ones(2)}, ValueError, "lr: expected a number or a tensor of one element"),
    ({"betas": (0.9, 1.0)}, ValueError, "betas: expected a number from 0.0 to 1.0 exclusively"),
    ({"betas": 0.9}, ValueError, "betas: expected two numbers"),
    ({"eps": -1e-8}, ValueError, "eps: expected"),
    ({"weight_decay": float("nan")}, ValueError, "weight_decay: expected"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        optim.AdamW([torch.nn.Parameter(torch.ones(3))], **options)
    optimizer = optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.ones(3, dtype=torch.complex64), r"weight: expected real numbers, got torch.complex64"),
        (torch.ones(3, dtype=torch.float16), "weight: expected float32 or bfloat16, got torch.float16"),
        (torch.ones(3).to_sparse(), "weight: expected a dense tensor, got torch.sparse_coo"),
    ],
)
def test_bad_parameters_are_named(values, message):
    with pytest.raises(TypeError, match=message):
        optim.AdamW([("bias", torch.nn.Parameter(torch.ones(2))), ("weight", torch.nn.Parameter(values))])
    frozen = torch.nn.Parameter(values, requires_grad=False)
    optim.AdamW([torch.nn.Parameter(torch.ones(2)), frozen])


def test_tensor_subclasses_are_refused_where_they_are_trained():
    quantised = torch.nn.Parameter(quant.quantize_nf4(torch.ones(4, 64)), requires_grad=False)
    optim.AdamW([torch.nn.Parameter(torch.ones(2)), quantised])
    wrapped = TwoTensor(torch.ones(2), torch.ones(2)).requires_grad_()
    with pytest.raises(TypeError, match=r"params\[0\]: expected a plain tensor, got TwoTensor"):
        optim.AdamW([wrapped])


def test_parameters_on_several_devices_are_refused():
    with pytest.raises(ValueError, match=r"params\[1\]: expected device cpu, that of params\[0\], got meta"):
        optim.AdamW([torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2, device="meta"))])


def test_bad_gradients_and_arguments_of_a_step_change_nothing():
    embedding, other = torch.nn.Embedding(5, 3, sparse=True), torch.nn.Parameter(torch.ones(2))
    optimizer = optim.AdamW([other, *embedding.parameters()])
    embedding(torch.tensor([1])).sum().backward()
    other.grad = torch.ones(2)
    with pytest.raises(TypeError, match=r"the gradient of params\[1\]: expected a dense tensor, got torch.sparse_coo"):
        optimizer.step()
    with pytest.raises(ValueError, match="max_norm: expected"):
        optimizer.step(max_norm=0.0)
    with pytest.raises(ValueError, match="loss_scale: expected"):
        optimizer.step(loss_scale=-1.0)
    assert torch.equal(other, torch.ones(2)) and not optimizer.state


def damaged(saved, key, value):
    saved["state"][0][key] = value
    return saved


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda s: damaged(s, "exp_avg", s["state"][0]["exp_avg"][:-1]),
            r"state\[0\]\[exp_avg\]: expected shape \(600,\)",
        ),
        (
            lambda s: damaged(s, "exp_avg_sq_absmax", torch.ones(9)),
            r"exp_avg_sq_absmax\]: expected shape \(3,\), got \(9,\)",
        ),
        (lambda s: damaged(s, "exp_avg", 3), r"exp_avg\]: expected shape \(600,\), got int"),
        (lambda s: s["state"][0].pop("exp_avg") is None or s, r"state\[0\]: expected 'exp_avg'"),
        (lambda s: s["param_groups"][0].pop("betas") and s, r"param_groups\[0\]: expected betas"),
        (lambda s: s["param_groups"][0].update(amsgrad=True) or s, r"param_groups\[0\]: amsgrad=True"),
        (lambda s: s["param_groups"][0].update(state_bits=3) or s, "state_bits: expected one of"),
        (lambda s: s["param_groups"].append({"params": []}) or s, "different number of parameter groups"),
    ],
)
def test_a_damaged_checkpoint_changes_nothing(damage, message):
    param = torch.nn.Parameter(normal(600, 0))
    optimizer = optim.AdamW([param], state_bits=8)
    train(optimizer, [param], 2)
    saved = damage(copy.deepcopy(optimizer.state_dict()))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(after["state"][0][key], value) for key, value in before["state"][0].items())


@every_width
def test_operator_passes_opcheck_and_refuses_what_does_not_fit(bits):
    param = torch.ones(300)
    moments, absmax = zip(*(codes.new_moment(param, bits) for _ in range(2)), strict=True)
    absmax = [a for a in absmax if a is not None]
    arguments = [
        [param],
        [torch.ones(300)],
        list(moments),
        absmax,
        [],
        [1],
        [0],
        [0],
        0,
        bits,
        1.0,
        torch.ones(()),
        torch.ones(()),
        0.1,
        0.9,
        0.99,
        1e-8,
        0.0,
    ]
    torch.library.opcheck(torch.ops.memkernels.adamw_.default, tuple(arguments))
    for at, wrong, message in (
        (0, [torch.ones(300).double()], r"params\[0\]: expected float32 or bfloat16"),
        (1, [torch.ones(299)], r"grads\[0\]: expected 300 contiguous elements"),
        (1, [torch.ones(600)[::2]], r"grads\[0\]: expected 300 contiguous elements"),
        (2, [moments[0], moments[1][:-1]], r"moments\[1\]: expected"),
        (2, moments[:1], "moments: expected 2 for 1 parameters, got 1"),
        (4, [torch.ones(300, dtype=torch.int16)], r"remainders\[0\]: a float32 parameter has none"),
        (7, [128], r"origins\[0\]: expected a multiple of 256, got 128"),
        (9, 5, "state_bits: expected 32, 16, 8 or 4, got 5"),
        (11, torch.ones(2), "grad_factor: expected one element, got 2"),
        (11, torch.ones((), dtype=torch.float64), "grad_factor: expected dtype Float, got Double"),
        (12, torch.ones(2), "lr_factor: expected one element, got 2"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.memkernels.adamw_(*arguments[:at], wrong, *arguments[at + 1 :])


def test_a_copy_steps_as_the_original():
    optimizer = optim.AdamW([torch.nn.Parameter(normal((300,), 0, torch.bfloat16))], state_bits=8)
    for step in range(2):  # of an optimizer that has made no step, and of one that has
        copied = copy.deepcopy(optimizer)
        (own,), (other,) = optimizer.param_groups[0]["params"], copied.param_groups[0]["params"]
        for of, parameter in ((optimizer, own), (copied, other)):
            parameter.grad = torch.full_like(parameter, 1.0 + step)
            of.step()
        assert other is not own and torch.equal(own, other)
