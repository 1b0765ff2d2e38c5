"""optim.save_checkpoint and load_checkpoint: from any number of ranks into any other, torch's AdamW, and damage."""

import contextlib
import copy
import json
import os
import pickle
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from memkernels import optim
from memkernels.optim import codes
from memkernels.optim.local import local_of
from memkernels.optim.sharded.index import index_text

STORAGES = {
    "float32": {"state_bits": 32},
    "bfloat16": {"state_bits": 16, "rounding": "remainder", "seed": 3},
    "codes8": {"state_bits": 8, "rounding": "remainder"},
    "codes4": {"state_bits": 4},
}


class Model(torch.nn.Module):
    """A tied weight, a frozen one, one that no step reaches, buffers, sizes that no number of ranks divides."""

    def __init__(self, dtype, width=70):
        super().__init__()
        self.embed = torch.nn.Embedding(19, width)
        self.body = torch.nn.Sequential(
            torch.nn.Linear(width, 99), torch.nn.BatchNorm1d(99), torch.nn.Linear(99, width)
        )
        self.frozen = torch.nn.Linear(width, width).requires_grad_(False)
        self.never = torch.nn.Linear(2, 3)
        self.head = torch.nn.Linear(width, 19, bias=False)
        self.head.weight = self.embed.weight
        self.to(dtype)

    def forward(self, ids):
        return self.head(self.frozen(self.body(self.embed(ids))))


def model_of(name, seed=0):
    torch.manual_seed(seed)
    return Model(torch.bfloat16 if "remainder" in STORAGES[name].values() else torch.float32)


def groups_of(model):
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.dim() > 1], "lr": 0.02},
        {"params": [p for p in params if p.dim() == 1], "weight_decay": 0.0},
    ]


def train(model, optimizer, steps, first=0):
    """Of gradients that are the same on every rank."""
    for step in range(first, first + steps):
        optimizer.zero_grad()
        ids = torch.randint(0, 19, (8,), generator=torch.Generator().manual_seed(step))
        model(ids).float().square().mean().backward()
        optimizer.step()


def alone(name, steps=3, cls=optim.AdamW, seed=0):
    model = model_of(name, seed)
    optimizer = cls(groups_of(model), **(STORAGES[name] if cls is optim.AdamW else {}))
    train(model, optimizer, steps)
    return model, optimizer


def sharded(name, stage, seed):
    model = model_of(name, seed)
    optimizer = optim.ShardedOptimizer(
        model, optim.AdamW, stage=stage, params=groups_of(model), bucket_bytes=9000, **STORAGES[name]
    )
    return model, optimizer


def assert_same(model, optimizer, expected, whole):
    """Every value, and this rank's part of every state, bit for bit."""
    optimizer.wait()
    for key, value in expected.state_dict().items():
        own = model.state_dict()[key]
        assert torch.equal(own.full_tensor() if hasattr(own, "full_tensor") else own, value), key
    for of_group, group, own in zip(optimizer.parts(), whole.param_groups, optimizer.param_groups, strict=True):
        assert all(own[key] == value for key, value in group.items() if not key.startswith("param"))
        for part, parameter in zip(of_group, group["params"], strict=True):
            mine, theirs = optimizer.local.state.get(part.parameter, {}), whole.state.get(parameter, {})
            assert mine.keys() == theirs.keys(), part.name
            for key, value in theirs.items():
                if key == "step":
                    assert mine[key] == value
                    continue
                each = codes.BLOCK_SIZE[group["state_bits"]] if key.endswith("absmax") else 1
                each = 2 if group["state_bits"] == 4 and each == 1 else each
                own, flat, first = local_of(mine[key]).reshape(-1), value.reshape(-1), part.first // each
                assert len(own) == -(-local_of(part.parameter).numel() // each)
                assert torch.equal(own, flat[first : first + len(own)]), (part.name, key)


def save_on_two(folder):
    for name in STORAGES:
        model, optimizer = sharded(name, 1, 0)
        train(model, optimizer, 3)
        optim.save_checkpoint(folder / f"two-{name}", model, optimizer, extra={"step": 3})
        with pytest.raises(FileExistsError, match="overwrites nothing"):
            optim.save_checkpoint(folder / f"two-{name}", model, optimizer)


def load_on_three(folder):
    for name in STORAGES:
        model, optimizer = sharded(name, 2, 1)
        model(torch.arange(8)).sum().backward()
        assert optim.load_checkpoint(folder / f"two-{name}", model, optimizer) == {"step": 3}
        assert_same(model, optimizer, *alone(name))
        optim.save_checkpoint(folder / f"three-{name}", model, optimizer)
    damaged = folder / "two-codes8"
    file = sorted(damaged.glob("*.safetensors"))[0]
    dist.barrier()
    if dist.get_rank() == 0:
        file.write_bytes(file.read_bytes()[:-1])
    dist.barrier()
    model, optimizer = sharded("codes8", 2, 1)
    with pytest.raises(ValueError, match="missing, truncated or damaged"):
        optim.load_checkpoint(damaged, model, optimizer)


def sharded_by_rows(name):
    """With states in float32."""
    model = model_of(name, 1)
    return model, optim.ShardedOptimizer(
        model, optim.AdamW, stage=3, params=groups_of(model), **(STORAGES[name] | {"state_bits": 32})
    )


def assert_decoded(optimizer, expected, whole):
    """This rank's part of every moment is the value of the codes."""
    cut = 0
    for of_group, group in zip(optimizer.parts(), whole.param_groups, strict=True):
        bits = group["state_bits"]
        for part, parameter in zip(of_group, group["params"], strict=True):
            state = whole.state.get(parameter, {})
            cut += bool(part.first % codes.BLOCK_SIZE[bits])
            for key, signed in optimizer.local.moments({}) if state else ():
                exact = codes.decode(state[key], state[f"{key}_absmax"], bits, signed, parameter.shape).view(-1)
                own = local_of(optimizer.local.state[part.parameter][key]).reshape(-1)
                assert torch.equal(own, exact[part.first : part.first + len(own)]), (part.name, key)
    assert cut or dist.get_rank() == 0


def load_on_four(folder):
    for name in STORAGES:
        model, optimizer = sharded(name, 1, 1)
        assert optim.load_checkpoint(folder / f"three-{name}", model, optimizer) is None
        train(model, optimizer, 2, first=3)
        assert_same(model, optimizer, *alone(name, 5))
        optim.save_checkpoint(folder / f"four-{name}", model, optimizer)
    for source, target in (("three", "fully"), ("fully", "again")):  # by stage 3; its rows cut blocks, so float32 alone
        model, optimizer = sharded("float32", 3, 1)
        optim.load_checkpoint(folder / f"{source}-float32", model, optimizer)
        if source == "three":
            train(model, optimizer, 2, first=3)
        assert_same(model, optimizer, *alone("float32", 5))
        optim.save_checkpoint(folder / f"{target}-float32", model, optimizer)
    for name in ("codes8", "codes4"):  # whose blocks the rows cut: the other states come along, and are left out
        model, optimizer = sharded_by_rows(name)
        optim.load_checkpoint(folder / f"three-{name}", model, optimizer)
        assert_decoded(optimizer, *alone(name))
    with pytest.raises(TypeError, match=r"expected a ShardedOptimizer, since embed\.weight is a DTensor, got AdamW"):
        optim.save_checkpoint(folder / "plain", model, optim.AdamW(groups_of(model)))


def load_on_one(folder):
    for saved in (*(f"four-{name}" for name in STORAGES), "again-float32"):
        name = saved.partition("-")[2]
        model, optimizer = alone(name, 1, seed=1)
        optim.load_checkpoint(folder / saved, model, optimizer)
        assert_equal(model, optimizer, *alone(name, 5))
    frozen_in_groups_or_not(folder)


def frozen_in_groups_or_not(folder):
    """ShardedOptimizer has the trained parameters by itself, what takes model.parameters() all of them."""
    model = model_of("float32")
    optimizer = optim.ShardedOptimizer(model, optim.AdamW, lr=0.02)
    train(model, optimizer, 2)
    optim.save_checkpoint(folder / "trained", model, optimizer)
    train(model, optimizer, 2, first=2)
    for cls in (optim.AdamW, torch.optim.AdamW):
        other, again = model_of("float32", 1), model_of("float32", 2)
        whole = cls(other.parameters())
        optim.load_checkpoint(folder / "trained", other, whole)
        train(other, whole, 1, first=2)
        optim.save_checkpoint(folder / cls.__module__, other, whole)
        optimizer = optim.ShardedOptimizer(again, optim.AdamW, stage=1)
        optim.load_checkpoint(folder / cls.__module__, again, optimizer)
        train(again, optimizer, 1, first=3)
        assert {float(state["step"]) for state in optimizer.local.state.values()} == {4.0}
        if cls is optim.AdamW:
            assert_same_values(again, model)
    frozen_since(folder)


def assert_same_values(model, expected):
    for key, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def frozen_since(folder):
    """States of a parameter that is frozen now are left out where it is listed, and an error where it is not."""
    thawed = model_of("float32")
    thawed.frozen.requires_grad_(True)
    optimizer = optim.AdamW(thawed.parameters())
    train(thawed, optimizer, 1)
    optim.save_checkpoint(folder / "thawed", thawed, optimizer)
    model = model_of("float32", 1)
    optimizer = optim.ShardedOptimizer(model, optim.AdamW, params=list(model.parameters()))
    optim.load_checkpoint(folder / "thawed", model, optimizer)
    optim.save_checkpoint(folder / "since", model, optimizer)
    assert optim.load_checkpoint(folder / "since", model, optimizer) is None
    assert torch.equal(model.frozen.weight, thawed.frozen.weight)
    with pytest.raises(ValueError, match=r"frozen\.bias: the optimizer trains nothing of that name"):
        optim.load_checkpoint(folder / "thawed", model, optim.AdamW([p for p in model.parameters() if p.requires_grad]))


def test_two_ranks_then_three_then_four_then_one(tmp_path):
    for ranks, function in ((2, save_on_two), (3, load_on_three), (4, load_on_four), (1, load_on_one)):
        run_ranks(function, ranks, tmp_path, tmp_path, seconds=120)


def assert_equal(model, optimizer, expected, whole):
    assert_same_values(model, expected)
    mine, theirs = optimizer.state_dict(), whole.state_dict()
    assert mine["param_groups"] == theirs["param_groups"] and mine["state"].keys() == theirs["state"].keys()
    for place, state in theirs["state"].items():
        assert state.keys() == mine["state"][place].keys()
        assert all(torch.equal(value, mine["state"][place][key]) for key, value in state.items())


def test_to_and_from_torch(tmp_path):
    model, optimizer = alone("float32")
    optim.save_checkpoint(tmp_path / "ours", model, optimizer)
    other, torchs = alone("float32", 1, torch.optim.AdamW, seed=1)
    optim.load_checkpoint(tmp_path / "ours", other, torchs)
    assert torchs.param_groups[0]["lr"] == 0.02 and torchs.param_groups[0]["betas"] == (0.9, 0.999)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) and optimizer.state[a].keys() == torchs.state[b].keys()
        assert all(torch.equal(value, torchs.state[b][key]) for key, value in optimizer.state[a].items())
    train(other, torchs, 1, first=3)
    optim.save_checkpoint(tmp_path / "torch", other, torchs)
    optim.load_checkpoint(tmp_path / "torch", model, optimizer)
    assert all(optimizer.state[p]["step"] == 4 for p in (model.embed.weight, model.body[0].bias))
    assert torch.equal(optimizer.state[model.embed.weight]["exp_avg"], torchs.state[other.embed.weight]["exp_avg"])


def test_what_was_one_tensor_loads_into_two(tmp_path):
    model, optimizer = alone("float32")
    optim.save_checkpoint(tmp_path / "saved", model, optimizer)
    other = model_of("float32", 1)
    other.head.weight = torch.nn.Parameter(torch.zeros(19, 70), requires_grad=False)
    groups = groups_of(other)
    groups[0]["params"] = [p for p in groups[0]["params"] if p is not other.head.weight]
    optim.load_checkpoint(tmp_path / "saved", other, optim.AdamW(groups))
    assert torch.equal(other.embed.weight, model.embed.weight) and torch.equal(other.head.weight, model.embed.weight)


@pytest.mark.parametrize("name", ["bfloat16", "codes8", "codes4"])
def test_states_of_few_bits_into_torch_and_into_other_widths(tmp_path, name):
    model, optimizer = alone(name)
    optim.save_checkpoint(tmp_path / "saved", model, optimizer)
    other, torchs = alone(name, 1, torch.optim.AdamW, seed=1)
    optim.load_checkpoint(tmp_path / "saved", other, torchs)
    wide = optim.AdamW(groups_of(other), rounding="remainder")
    optim.load_checkpoint(tmp_path / "saved", other, wide)
    bits = STORAGES[name]["state_bits"]
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        state = optimizer.state[a]
        assert torch.equal(a, b)
        for key, signed in optimizer.moments({}) if state else ():
            exact = codes.decode(state[key], state.get(f"{key}_absmax"), bits, signed, a.shape)
            assert torch.equal(wide.state[b][key], exact)
            torch.testing.assert_close(torchs.state[b][key].float(), exact, rtol=2**-8, atol=0)


def test_no_pickle_is_written_or_read(tmp_path):
    model, optimizer = alone("codes8")
    optim.save_checkpoint(tmp_path / "saved", model, optimizer)
    names = {file.name for file in (tmp_path / "saved").iterdir()}
    assert names == {"index.json", "shard-00001-model-00001-of-00001.safetensors"}
    forbidden = mock.Mock(side_effect=AssertionError("a pickle is read"))
    with contextlib.ExitStack() as patched:
        for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
            patched.enter_context(mock.patch.object(module, name, forbidden))
        optim.load_checkpoint(tmp_path / "saved", *alone("codes8", 1, seed=1))


def test_a_crash_while_saving_leaves_the_last_checkpoint(tmp_path):
    model, optimizer = alone("float32")
    optim.save_checkpoint(tmp_path / "step3", model, optimizer)
    before = {file.name: file.read_bytes() for file in (tmp_path / "step3").iterdir()}
    for name in ("fsync", "rename"):
        with mock.patch.object(os, name, side_effect=OSError("no space")), pytest.raises(OSError, match="no space"):
            optim.save_checkpoint(tmp_path / "step4", model, optimizer)
        assert [file.name for file in tmp_path.iterdir()] == ["step3"]
    assert {file.name: file.read_bytes() for file in (tmp_path / "step3").iterdir()} == before
    optim.save_checkpoint(tmp_path / "step4", model, optimizer)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["step3", "step4"]
    with pytest.raises(TypeError, match="not JSON serializable"):
        optim.save_checkpoint(tmp_path / "step5", model, optimizer, extra=object())
    assert not (tmp_path / "step5").exists()


def other_index(folder, change):
    index = json.loads((folder / "index.json").read_text())
    del index["crc32"]
    change(index)
    (folder / "index.json").write_text(index_text(index))


def other_rate(folder):
    text = (folder / "index.json").read_text()
    assert text.count('"lr": 0.02') == 1
    (folder / "index.json").write_text(text.replace('"lr": 0.02', '"lr": 0.03'))


def flip(folder):
    file = next(folder.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


DAMAGE = [
    (flip, "missing, truncated or damaged"),
    (lambda folder: next(folder.glob("*.safetensors")).unlink(), "missing, truncated or damaged"),
    (lambda folder: (folder / "index.json").unlink(), "index.json: not to be read"),
    (lambda folder: (folder / "index.json").write_text("{"), "index.json: not to be read"),
    (other_rate, "index.json: not to be read as a checkpoint's: its checksum does not match"),
    (lambda folder: other_index(folder, lambda index: index.update(version=7)), "expected version 1"),
    (
        lambda folder: other_index(folder, lambda i: i["groups"][0]["parameters"].pop("never.weight")),
        "never.weight: the optimizer trains .*, the checkpoint has nothing",
    ),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_a_damaged_checkpoint_changes_nothing(tmp_path, damage, message):
    optim.save_checkpoint(tmp_path / "saved", *alone("codes4"))
    damage(tmp_path / "saved")
    assert_unchanged(tmp_path / "saved", *alone("codes4", 1, seed=1), message)


def assert_unchanged(path, model, optimizer, message):
    values, states = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optim.load_checkpoint(path, model, optimizer)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in values.items())
    for place, state in states["state"].items():
        assert all(torch.equal(value, optimizer.state_dict()["state"][place][key]) for key, value in state.items())


def test_checkpoints_of_other_models_and_optimizers_change_nothing(tmp_path):
    optim.save_checkpoint(tmp_path / "saved", *alone("float32"))
    wide = Model(torch.float32, width=71)
    assert_unchanged(tmp_path / "saved", wide, optim.AdamW(groups_of(wide)), "a checkpoint of another model")
    model = model_of("float32")
    assert_unchanged(tmp_path / "saved", model, optim.SGD(groups_of(model), momentum=0.9), "another optimizer")
    regrouped = optim.AdamW(model.parameters())
    assert_unchanged(tmp_path / "saved", model, regrouped, "expected in one group with")
    with pytest.raises(ValueError, match=r"optimizer: expected parameters of model, got another of shape \(2, 3\)"):
        optim.save_checkpoint(tmp_path / "other", model, optim.AdamW(torch.nn.Linear(3, 2).parameters()))
    assert not (tmp_path / "other").exists()


def losses(model, optimizer, first, last, rank, ranks, parts=6):
    """Of steps whose batch has as many parts however many ranks share them; the mean over the batch."""
    found = []
    for step in range(first, last):
        optimizer.zero_grad()
        total = torch.zeros(())
        for part in range(rank, parts, ranks):
            ids = torch.randint(0, 19, (8,), generator=torch.Generator().manual_seed(100 * step + part))
            loss = torch.nn.functional.cross_entropy(model(ids), ids.roll(1)) * ranks / parts
            loss.backward()
            total += loss.detach() / ranks
        optimizer.step()
        if ranks > 1:
            dist.all_reduce(total)
        found.append(total.item())
    return found


def small_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Embedding(19, 70), torch.nn.Linear(70, 70), torch.nn.Tanh(), torch.nn.Linear(70, 19)
    )


def job(folder, dies):
    """From the last checkpoint to step 9; a checkpoint after step 3; the second rank dies at step 5."""
    rank, ranks, model, first, found = dist.get_rank(), dist.get_world_size(), small_model(), 0, []
    optimizer = optim.ShardedOptimizer(model, optim.AdamW, bucket_bytes=9000, lr=1e-2)
    if (folder / "step3").exists():
        first = optim.load_checkpoint(folder / "step3", model, optimizer)
    while first < 9:
        if dies and first == 5 and rank == 1:
            os._exit(0)
        started = time.monotonic()
        try:
            found += losses(model, optimizer, first, first + 1, rank, ranks)
        except RuntimeError as error:
            # The exchange that fails may be the loss's, which is not the optimizer's.
            assert dies and time.monotonic() - started < 30
            with pytest.raises(optim.RankFailure, match="one of them has ended"):
                optimizer.step()
            (folder / f"ended{rank}").write_text(str(error))
            os._exit(0)
        first += 1
        if first == 3 and dies:
            optim.save_checkpoint(folder / "step3", model, optimizer, extra=first)
    if rank == 0:
        (folder / "losses.json").write_text(json.dumps(found))


def test_a_job_whose_rank_died_goes_on_at_fewer_ranks_with_the_same_losses(tmp_path):
    run_ranks(job, 3, tmp_path, tmp_path, True, seconds=120)
    assert (tmp_path / "ended0").exists() and (tmp_path / "ended2").exists()
    run_ranks(job, 2, tmp_path, tmp_path, False, seconds=120)
    model = small_model()
    expected = losses(model, optim.AdamW(model.parameters(), lr=1e-2), 0, 9, 0, 1)[3:]
    assert json.loads((tmp_path / "losses.json").read_text()) == pytest.approx(expected, rel=1e-5)
