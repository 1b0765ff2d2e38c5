"""The routers' product: in float32, of x times noise that is never stored."""

from __future__ import annotations

import pytest
import torch

from memkernels.ops.router_logits import reference
from memkernels.ops.router_logits.op import router_logits
from memkernels.testing import assert_within_factor_two, check_op, implementations, random_tensor, saved_bytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEED = torch.tensor(1234567890123456789)
JITTER = 0.3
on_every_implementation = pytest.mark.parametrize("implementation", implementations("row_noise"), ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@on_every_implementation
@dtypes
@pytest.mark.parametrize("columns", [1, 15, 64, 130])
def test_the_noise_is_that_of_the_reference_at_any_first_row(implementation, dtype, columns):
    with implementation.active() as device:
        x, seed = random_tensor(37, columns, dtype=dtype, device=device).detach(), SEED.to(device)
        for first_row in (5, 2**31 - 40):
            y = torch.ops.memkernels.row_noise(x, seed, JITTER, first_row)
            exact = reference.row_noise(x.double(), seed, JITTER, first_row)
            assert_within_factor_two("y", y, exact, reference.row_noise(x, seed, JITTER, first_row))
        part = torch.ops.memkernels.row_noise(x[10:].t().contiguous().t(), seed, JITTER, 2**31 - 30)
        assert torch.equal(part, y[10:])


def test_the_noise_is_uniform_and_differs_by_seed_row_and_column():
    ones, draws = torch.ones(512, 512), 512 * 512
    u = reference.row_noise(ones, SEED, JITTER, 0)
    assert 1 - JITTER <= u.min() < 1 - 0.99 * JITTER and 1 + 0.99 * JITTER < u.max() <= 1 + JITTER
    shares = torch.histc(u, 8, 1 - JITTER, 1 + JITTER) / draws
    assert (shares - 1 / 8).abs().max() < 5 * (1 / 8 * 7 / 8 / draws) ** 0.5
    for other in (reference.row_noise(ones, SEED + 1, JITTER, 0), u.roll(1, 0), u.roll(1, 1)):
        assert abs(torch.corrcoef(torch.stack([u.flatten(), other.flatten()]))[0, 1]) < 5 / draws**0.5


@on_every_implementation
@dtypes
@pytest.mark.parametrize("seed", [None, SEED], ids=["quiet", "jitter"])
@pytest.mark.parametrize("tokens", [0, 1, 23])
def test_logits_match_the_reference(implementation, tokens, seed, dtype):
    with implementation.active() as device:
        inputs = {
            "x": random_tensor(tokens, 70, dtype=dtype, device=device),
            "weight": random_tensor(5, 70, dtype=dtype, device=device, seed=1, scale=0.1),
        }
        seed = None if seed is None else seed.to(device)
        check_op(router_logits, reference.router_logits, inputs, strided_grads=True, jitter=JITTER, seed=seed)


def test_several_tiles_of_tokens():
    inputs = {
        "x": random_tensor(70, 8200, dtype=torch.bfloat16),
        "weight": random_tensor(3, 8200, dtype=torch.bfloat16, seed=1, scale=0.01),
    }
    check_op(router_logits, reference.router_logits, inputs, jitter=JITTER, seed=SEED)


@pytest.mark.parametrize("seed", [None, SEED], ids=["quiet", "jitter"])
def test_padding_has_no_logits_and_no_gradient_whatever_it_holds(seed):
    padding_mask = torch.arange(23) % 7 == 3
    inputs = {
        "x": random_tensor(23, 70, dtype=torch.float32),
        "weight": random_tensor(5, 70, dtype=torch.float32, seed=1, scale=0.1),
    }
    inputs["x"].data[padding_mask] = torch.nan
    check_op(router_logits, reference.router_logits, inputs, jitter=JITTER, seed=seed, padding_mask=padding_mask)


def test_a_weight_in_another_dtype():
    inputs = {
        "x": random_tensor(23, 70, dtype=torch.bfloat16),
        "weight": random_tensor(5, 70, dtype=torch.float32, seed=1, scale=0.1),
    }
    check_op(router_logits, reference.router_logits, inputs, jitter=JITTER, seed=SEED)
    with torch.autocast("cpu", torch.bfloat16):
        logits = router_logits(**inputs)
    assert logits.dtype == torch.float32 and torch.equal(logits, router_logits(**inputs))


def test_keeps_x_as_it_is_where_the_weight_is_trained():
    x, weight = random_tensor(64, 32, dtype=torch.bfloat16), random_tensor(4, 32, dtype=torch.bfloat16)
    for of, kept in ((weight, x.nbytes + 8), (weight.detach(), 8)):
        seed = SEED.clone()
        assert (
            saved_bytes(lambda of=of, seed=seed: router_logits(x, of, jitter=JITTER, seed=seed), exclude=(of,)) == kept
        )


def test_gradients_only_where_they_are_wanted():
    every = {"x": random_tensor(9, 8, dtype=torch.float32), "weight": random_tensor(4, 8, dtype=torch.float32, seed=1)}
    whole = torch.autograd.grad(router_logits(**every, seed=SEED, jitter=JITTER).sum(), tuple(every.values()))
    for name, expected in zip(every, whole, strict=True):
        inputs = {key: tensor.detach().requires_grad_(key == name) for key, tensor in every.items()}
        router_logits(**inputs, seed=SEED, jitter=JITTER).sum().backward()
        assert torch.equal(inputs[name].grad, expected)


@on_every_implementation
def test_opcheck(implementation):
    with implementation.active() as device:
        memkernels, seed = torch.ops.memkernels, SEED.to(device)
        x, weight, dlogits = (torch.randn(shape, device=device) for shape in ((9, 6), (4, 6), (9, 4)))
        for operator, args in (
            (memkernels.row_noise, (x, seed, JITTER, 4)),
            (memkernels.router_logits_fwd, (x.bfloat16(), weight, seed, JITTER)),
            (memkernels.router_logits_bwd, (dlogits, x, weight, seed, JITTER, torch.float16, True)),
            (memkernels.router_logits_bwd, (dlogits, None, weight, None, 0.0, torch.float32, False)),
            (memkernels.router_logits_bwd, (dlogits, x, weight, None, 0.0, torch.float32, True, x[:, 0] > 0)),
        ):
            torch.library.opcheck(operator.default, args)
