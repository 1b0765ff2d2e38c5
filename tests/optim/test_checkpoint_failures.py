"""optim.save_checkpoint and load_checkpoint where a rank, the disk, an index or a dtype is not as it should be."""

import os
import shutil
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from memkernels import optim
from memkernels.optim.rounding import join
from memkernels.optim.sharded import checkpoint


def model_of(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.Tanh(), torch.nn.Linear(20, 30)).to(dtype)


def train(model, optimizer, steps=2):
    for step in range(steps):
        x = torch.randn(4, 30, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def saved_with_remainders(folder):
    """A bfloat16 model whose weights are float32 ones, and these."""
    model = model_of(torch.bfloat16)
    optimizer = optim.AdamW(model.parameters(), lr=0.01, rounding="remainder")
    train(model, optimizer)
    optim.save_checkpoint(folder, model, optimizer)
    return [join(p.detach(), optimizer.state[p]["remainder"]) for p in model.parameters()], optimizer.state_dict()


@pytest.mark.parametrize("cls", [optim.AdamW, torch.optim.AdamW])
def test_a_float32_model_gets_the_master_weights(cls, tmp_path):
    masters, state_dict = saved_with_remainders(tmp_path / "saved")
    model = model_of(seed=1)
    optimizer = cls(model.parameters())
    optim.load_checkpoint(tmp_path / "saved", model, optimizer)
    for parameter, master in zip(model.parameters(), masters, strict=True):
        assert torch.equal(parameter, master) and not torch.equal(master, master.bfloat16().float())
        assert optimizer.state[parameter].keys() == {"step", "exp_avg", "exp_avg_sq"}
    optim.load_checkpoint(tmp_path / "saved", model, optimizer)  # again
    if cls is optim.AdamW:
        with pytest.raises(ValueError, match=r"state\[0\]: remainder: 16 bits of weights"):
            optimizer.load_state_dict(state_dict)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_torchs_states_of_any_dtype(dtype, tmp_path):
    model, other = model_of(dtype), model_of(dtype, seed=1)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01, eps=1e-4) for m in (model, other)]
    train(model, optimizers[0])
    optim.save_checkpoint(tmp_path / "saved", model, optimizers[0])
    optim.load_checkpoint(tmp_path / "saved", other, optimizers[1])
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        for key, value in optimizers[0].state[a].items():
            assert torch.equal(value, optimizers[1].state[b][key])


def test_a_parameter_without_elements(tmp_path):
    models = [torch.nn.ParameterDict({"none": torch.zeros(0, 3), "some": torch.full((5,), s)}) for s in (1.0, 2.0)]
    optimizers = [optim.AdamW(model.parameters()) for model in models]
    (models[0]["none"].sum() + models[0]["some"].sum()).backward()
    optimizers[0].step()
    optim.save_checkpoint(tmp_path / "saved", models[0], optimizers[0])
    optim.load_checkpoint(tmp_path / "saved", models[1], optimizers[1])
    assert torch.equal(models[0]["some"], models[1]["some"])
    assert optimizers[1].state[models[1]["none"]]["exp_avg"].shape == (0, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.pop("groups"), "groups: expected a list, got None"),
        (lambda index: index.update(files=[]), r"files: expected a dict, got \[\]"),
        (lambda index: index.pop("extra"), "extra: expected a value"),
        (lambda index: index["groups"][0].pop("options"), r"groups\[0\]: not as save_checkpoint writes it"),
        (lambda index: index["groups"][0]["options"].update(state_bits=5), r"groups\[0\]: not as"),
        (lambda index: index["groups"][0]["parameters"]["0.weight"].update(shape="wide"), r"groups\[0\]: not as"),
        (lambda index: index["groups"][0]["parameters"]["0.weight"].pop("step"), r"groups\[0\]: not as"),
        (
            lambda index: index["groups"][0]["parameters"]["0.weight"]["state"].update(exp_avg="torch.int3"),
            r"groups\[0\]: not as",
        ),
    ],
)
def test_an_index_of_another_structure(change, message, tmp_path):
    model = model_of()
    optimizer = optim.AdamW(model.parameters())
    optim.save_checkpoint(tmp_path / "saved", model, optimizer)
    index = checkpoint.read_index(tmp_path / "saved")
    del index["crc32"]
    change(index)
    (tmp_path / "saved" / "index.json").write_text(checkpoint.index_text(index))
    with pytest.raises(ValueError, match=message):
        optim.load_checkpoint(tmp_path / "saved", model, optimizer)


class NotToBeSent(Exception):
    """As errors of safetensors are, which pickle does not find."""

    def __reduce__(self):
        raise TypeError("cannot be pickled")


def fails(*_):
    raise NotToBeSent("a broken disk")


def two_ranks(folder):
    rank = dist.get_rank()
    for stage in (1, 2, 3):
        model = model_of(seed=1)
        optimizer = optim.ShardedOptimizer(model, optim.AdamW, stage=stage, bucket_bytes=2000)
        masters = torch.load(folder / "masters")
        optim.load_checkpoint(folder / "saved", model, optimizer)
        for parameter, master in zip(model.parameters(), masters, strict=True):
            whole = parameter.full_tensor() if stage == 3 else parameter
            assert torch.equal(whole, master)
        for damaged in ("truncated", "other model"):
            with pytest.raises(ValueError, match=r"truncated or damaged|a checkpoint of another model"):
                optim.load_checkpoint(folder / damaged, model, optimizer)
        with pytest.raises(FileExistsError, match="overwrites nothing"):
            optim.save_checkpoint(folder / "saved", model, optimizer)
        for parameter, master in zip(model.parameters(), masters, strict=True):
            assert torch.equal(parameter.full_tensor() if stage == 3 else parameter, master)
    with pytest.raises(ValueError, match="the ranks differ: rank 0 has path"):
        optim.save_checkpoint(folder / f"of{rank}", model, optimizer)
    with pytest.raises((TypeError, ValueError), match="path: expected a folder's name, got 3"):
        optim.save_checkpoint(3 if rank else folder / "new", model, optimizer)
    with pytest.raises((TypeError, ValueError), match="model: expected a kind of Module, got int"):
        optim.save_checkpoint(folder / "new", 3 if rank else model, optimizer)
    with pytest.raises(ValueError, match="the ranks differ: rank 0 has path"):
        optim.load_checkpoint(folder / ("other" if rank else "saved"), model, optimizer)
    with mock.patch.object(checkpoint.dcp.HuggingFaceStorageWriter, "write_data", fails) if rank else mock.MagicMock():
        started = time.monotonic()
        with pytest.raises(OSError, match="rank 1: NotToBeSent: a broken disk"):
            optim.save_checkpoint(folder / "broken", model, optimizer)
        assert time.monotonic() - started < 60
    dist.barrier()
    assert not [path for path in folder.iterdir() if path.name[0] == "." or path.name in ("of0", "of1", "broken")]
    # A mesh that does not fit on one rank is every rank's error.
    wrong = {"mesh": "none"} if rank else {}
    for stage in (1, 3):
        with pytest.raises(ValueError, match="mesh: expected a DeviceMesh of"):
            optim.ShardedOptimizer(model_of(), optim.AdamW, stage=stage, **wrong)
    dying = mock.patch.object(checkpoint.dcp.HuggingFaceStorageWriter, "write_data", lambda *_: os._exit(0))
    with dying if rank else mock.MagicMock(), pytest.raises(optim.RankFailure, match="one of them has ended"):
        optim.save_checkpoint(folder / "ended", model, optimizer)
    assert not [path for path in folder.iterdir() if "ended" in path.name]
    (folder / "all").touch()
    os._exit(0)


def test_two_ranks(tmp_path):
    masters, _ = saved_with_remainders(tmp_path / "saved")
    torch.save(masters, tmp_path / "masters")
    for name in ("other", "truncated"):
        shutil.copytree(tmp_path / "saved", tmp_path / name)
    (file,) = (tmp_path / "truncated").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    other = torch.nn.Linear(30, 20)
    optim.save_checkpoint(tmp_path / "other model", other, optim.AdamW(other.parameters()))
    run_ranks(two_ranks, 2, tmp_path, tmp_path, seconds=120)
    assert (tmp_path / "all").exists()
