"""optim.step_in_backward: the results of backward and then a step, with one gradient at a time."""

import gc
import warnings
import weakref

import pytest
import torch

from memkernels import optim
from memkernels.optim.clipping import total_norm
from memkernels.testing import assert_within_factor_two, implementations, random_tensor

RULES = [
    (optim.AdamW, {"lr": 0.01, "state_bits": 8}),
    (optim.Lion, {"lr": 0.01, "weight_decay": 0.1}),
    (optim.SGD, {"lr": 0.01, "momentum": 0.9}),
]


class Tied(torch.nn.Module):
    """A projection used twice, a frozen layer, and one that only some batches reach."""

    def __init__(self):
        super().__init__()
        self.shared = torch.nn.Linear(8, 8)
        self.frozen = torch.nn.Linear(8, 8).requires_grad_(False)
        self.rare = torch.nn.Linear(8, 8, bias=False)

    def forward(self, x, rare=True):
        x = self.shared(self.frozen(self.shared(x).tanh()))
        return self.rare(x) if rare else x


def models(dtype=torch.float32):
    torch.manual_seed(0)
    one, other = Tied().to(dtype), Tied().to(dtype)
    other.load_state_dict(one.state_dict())
    return one, other


def loss_of(model, seed, rare=True, dtype=torch.float32):
    x = random_tensor(16, 8, dtype=dtype, seed=seed).detach()
    return (model(x, rare) - 3).square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("cls", "options"), RULES)
@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_as_backward_and_then_a_step(cls, options, dtype, max_norm):
    one, other = models(dtype)
    stepper = optim.step_in_backward(one, cls, max_norm=max_norm, **options)
    optimizer = cls([p for p in other.parameters() if p.requires_grad], **options)
    for step in range(5):
        stepper.backward(loss_of(one, step, step != 2, dtype))
        optimizer.zero_grad()
        loss_of(other, step, step != 2, dtype).backward()
        optimizer.step(max_norm=max_norm)
        assert all(p.grad is None for p in one.parameters())
        if max_norm is not None:
            torch.testing.assert_close(stepper.grad_norm, optimizer.grad_norm)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        if max_norm is None:
            assert torch.equal(a, b)
        else:  # the squares are added in another order, which may tip a rounding of bfloat16
            torch.testing.assert_close(a, b, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-6)


@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_one_gradient_at_a_time(max_norm):
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(6)))
    stepper = optim.step_in_backward(model, optim.AdamW, max_norm=max_norm)
    seen = []
    for param in model.parameters():  # called after the stepper's
        param.register_post_accumulate_grad_hook(
            lambda _: seen.append(sum(p.grad is not None for p in model.parameters()))
        )
    stepper.backward(model(torch.ones(2, 8)).sum())
    assert seen and max(seen) == 0


@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_leaves_that_others_train(max_norm):
    one, other = models()
    trained = optim.step_in_backward([one.shared.weight, one.shared.bias], optim.SGD, lr=0.1, max_norm=max_norm)
    trained.backward(loss_of(one, 0))
    loss_of(other, 0).backward()
    assert torch.equal(one.rare.weight.grad, other.rare.weight.grad) and one.shared.weight.grad is None


@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_accumulation(max_norm):
    one, other = models()
    stepper = optim.step_in_backward(one, optim.AdamW, max_norm=max_norm)
    optimizer = optim.AdamW([p for p in other.parameters() if p.requires_grad])
    with stepper.accumulate():
        loss_of(one, 0).backward()
        loss_of(one, 1).backward()
    stepper.backward(loss_of(one, 2, rare=False))
    sum(loss_of(other, i) for i in range(2)).backward()
    loss_of(other, 2, rare=False).backward()
    optimizer.step(max_norm=max_norm)
    assert all(p.grad is None for p in one.parameters())
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_groups_schedulers_and_checkpoints():
    one, other = models()
    groups = [{"params": [one.shared.weight], "lr": 0.5}, {"params": [one.shared.bias, one.rare.weight]}]
    stepper = optim.step_in_backward(groups, optim.SGD, lr=0.1, momentum=0.5)
    groups = [{"params": [other.shared.weight], "lr": 0.5}, {"params": [other.shared.bias, other.rare.weight]}]
    optimizer = optim.SGD(groups, lr=0.1, momentum=0.5)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 1) for o in (stepper.optimizer, optimizer)]
    for step in range(3):
        loss_of(one, step).backward()
        optimizer.zero_grad()
        loss_of(other, step).backward()
        optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for schedule in schedules:
                schedule.step()
        if step == 1:
            stepper.optimizer.load_state_dict(optimizer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_group_that_would_not_be_stepped_is_refused():
    model, _ = models()
    stepper = optim.step_in_backward([model.shared.weight], optim.AdamW)
    with pytest.raises(RuntimeError, match="step_in_backward: it steps the parameters it was made with"):
        stepper.optimizer.add_param_group({"params": [model.rare.weight]})
    assert len(stepper.optimizer.param_groups) == 1
    stepper.remove()
    stepper.optimizer.add_param_group({"params": [model.rare.weight]})


@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_parameters_that_are_thawed_later(max_norm):
    one, other = models()
    one.table = torch.nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    stepper = optim.step_in_backward(one.named_parameters(), optim.AdamW, max_norm=max_norm, lr=0.1)
    optimizer = optim.AdamW(other.parameters(), lr=0.1)
    assert not one.frozen.weight.requires_grad
    for thawed in (False, True, False):
        for model in (one, other):
            model.frozen.requires_grad_(thawed)
        stepper.backward(loss_of(one, 0))
        loss_of(other, 0).backward()
        optimizer.step(max_norm=max_norm)
        optimizer.zero_grad()
        assert one.frozen.weight.grad is None
        for name, parameter in other.named_parameters():
            torch.testing.assert_close(one.get_parameter(name), parameter)


def test_removed_hooks_leave_gradients():
    model, _ = models()
    before = model.shared.weight.detach().clone()
    optim.step_in_backward(model, optim.AdamW).remove()
    loss_of(model, 0).backward()
    assert model.shared.weight.grad is not None and torch.equal(model.shared.weight, before)


def test_what_is_dropped_is_freed():
    model, _ = models()
    stepper = optim.step_in_backward(model, optim.AdamW)
    loss_of(model, 0).backward()
    alive = [weakref.ref(kept) for kept in (stepper, stepper.optimizer, model.shared.weight)]
    del stepper, model
    gc.collect()
    assert [kept() for kept in alive] == [None] * 3


def test_a_stepper_that_is_dropped_is_told():
    model, _ = models()
    optim.step_in_backward(model, optim.AdamW)
    gc.collect()
    with pytest.raises(RuntimeError, match="step_in_backward: keep what it returned"):
        loss_of(model, 0).backward()


def test_bad_input_is_named():
    model, _ = models()
    with pytest.raises(TypeError, match="optimizer_class: expected an optimizer of"):
        optim.step_in_backward(model, torch.optim.AdamW)
    with pytest.raises(ValueError, match="max_norm: expected"):
        optim.step_in_backward(model, optim.AdamW, max_norm=-1.0)
    stepper = optim.step_in_backward(model, optim.AdamW, max_norm=1.0)
    before = model.shared.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"max_norm: call backward\(loss\) of what step_in_backward returned"):
        loss_of(model, 0).backward()
    assert torch.equal(model.shared.weight, before) and all(p.grad is None for p in model.parameters())
    stepper.remove()


@pytest.mark.parametrize("implementation", implementations("square_sum"), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_of_all_gradients(implementation, dtype):
    grads = [
        random_tensor(*shape, dtype=dtype, seed=i).detach() for i, shape in enumerate([(70001,), (), (0,), (33, 9)])
    ]
    grads.append(random_tensor(40, 30, dtype=dtype).detach().t())
    with implementation.active():
        norm = total_norm(grads)
    exact = torch.cat([g.double().reshape(-1) for g in grads]).norm()
    plain = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads]).norm()
    assert_within_factor_two("norm", norm, exact, plain)
    assert total_norm([]) == 0
    torch.library.opcheck(torch.ops.memkernels.square_sum.default, (grads,))
