"""optim.AdamW: what goes into a step beside states: groups, dtypes, clipping, a closure, GradScaler."""

import pytest
import torch
from optimizer_steps import OPTIONS, parameters, set_gradients

from memkernels import optim


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
