"""optim.AdamW: its state_dict and copies of it, to and from torch and other widths, and damaged."""

import copy
import io

import pytest
import torch
from optimizer_steps import OPTIONS, SHAPES, normal, parameters, train

from memkernels import optim
from memkernels.optim import codes

every_width = pytest.mark.parametrize("bits", [32, 16, 8, 4])


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


def test_a_copy_steps_as_the_original():
    optimizer = optim.AdamW([torch.nn.Parameter(normal((300,), 0, torch.bfloat16))], state_bits=8)
    for step in range(2):  # of an optimizer that has made no step, and of one that has
        copied = copy.deepcopy(optimizer)
        (own,), (other,) = optimizer.param_groups[0]["params"], copied.param_groups[0]["params"]
        for of, parameter in ((optimizer, own), (copied, other)):
            parameter.grad = torch.full_like(parameter, 1.0 + step)
            of.step()
        assert other is not own and torch.equal(own, other)
