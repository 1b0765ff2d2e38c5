"""The main job: its text, its two runs, its report, and all of it at a tiny size."""

import dataclasses
import importlib.util
import math
import sysconfig
import time
from pathlib import Path

import pytest
import torch

from memkernels.cli import main
from memkernels.demo import cli, memory
from memkernels.demo.data import standard_library, windows
from memkernels.demo.llama import Settings, make_job
from memkernels.demo.memory import Memory
from memkernels.demo.report import draw, largest_difference, table
from memkernels.demo.run import Run
from memkernels.demo.train import Training, train
from memkernels.testing import run_in_child

TINY = Settings(None, steps=3, tokens=32, width=128, feed_forward=96, layers=2)
PLAIN = Run(
    Training(21_000_000, 2.0, [0, 10], {"held-out loss": [5.5, 3.25]}), Memory(600.0, [(0.0, 0.0), (1.0, 600.0)])
)
PATCHED = Run(
    Training(21_000_000, 1.5, [0, 10], {"held-out loss": [5.5, 3.251]}), Memory(60.0, [(0.0, 0.0), (1.0, 60.0)])
)


def test_text_is_the_standard_librarys_and_what_is_held_out_is_not_trained_on():
    text, held_out = (tensor.numpy().tobytes() for tensor in standard_library())
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    assert len(text) + len(held_out) == sum(path.stat().st_size for path in files)
    assert len(held_out) > 50_000
    first, second = (path.read_bytes() for path in files[:2])
    assert held_out[: len(first)] == first
    assert text[: len(second)] == second
    assert all(path.read_bytes() not in text for path in files[::20] if path.stat().st_size > 100)


def test_a_python_without_sources_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="sources of Python's standard library"):
        standard_library(tmp_path)


def test_windows_are_slices_that_reach_both_ends():
    text = torch.arange(10, dtype=torch.uint8)
    cut = windows(text, 200, 4, seed=0)
    assert cut.dtype == torch.int64
    assert torch.equal(cut, cut[:, :1] + torch.arange(4))
    assert cut.min() == 0 and cut.max() == 9
    assert torch.equal(cut, windows(text, 200, 4, seed=0)) and not torch.equal(cut, windows(text, 200, 4, seed=1))


@pytest.mark.parametrize("recompute", ["none", "sublayer", "layer"])
def test_both_runs_learn_the_same(recompute):
    pytest.importorskip("transformers", reason="transformers is not installed: pip install memkernels[hf]")
    plain, patched = train(make_job(TINY)), train(make_job(dataclasses.replace(TINY, recompute=recompute)))
    assert plain.checkpoints == [0, 1, 2, 3] and plain.losses[3] < plain.losses[0] - 0.1
    assert plain.losses[0] == pytest.approx(math.log(256), abs=0.5)
    assert plain.losses == pytest.approx(patched.losses, abs=1e-4)
    assert plain.parameters == patched.parameters


def test_jobs_begin_alike_and_only_one_is_patched(capsys):
    pytest.importorskip("transformers", reason="transformers is not installed: pip install memkernels[hf]")
    plain, patched = make_job(TINY), make_job(dataclasses.replace(TINY, recompute="layer"))
    assert "recompute='layer'" in capsys.readouterr().err
    assert "forward" in vars(patched.model) and "forward" not in vars(plain.model)
    for ours, theirs in zip(patched.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert all(map(torch.equal, plain.batches, patched.batches))


def record_a_rise():
    def step():
        time.sleep(0.1)
        held = torch.ones(16_000_000)
        time.sleep(0.1)
        return held.sum()

    return memory.record(step, torch.device("cpu"))


def test_memory_is_recorded_as_it_rises():
    timeline = run_in_child(record_a_rise)
    assert max(megabytes for _, megabytes in timeline) == pytest.approx(64, abs=8)
    assert timeline[0][1] < 8
    seconds = [at for at, _ in timeline]
    assert seconds == sorted(seconds) and 0.19 < seconds[-1] < 5


def test_report(tmp_path):
    assert largest_difference(PLAIN, PATCHED) == pytest.approx(0.001)
    lines = [line.split() for line in table(PLAIN, PATCHED).splitlines()]
    assert lines[1][-5:] == ["600", "MB", "60", "MB", "0.10x"]
    assert lines[2][-5:] == ["2", "s", "1.5", "s", "0.75x"]
    assert lines[4][-3:] == ["3.2500", "3.2510", "+1.0e-03"]
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install memkernels[plot]")
    paths = draw(PLAIN, PATCHED, tmp_path)
    assert [path.name for path in paths] == ["memory.png", "loss.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


@pytest.mark.parametrize(("difference", "status"), [(0.001, 0), (0.1, 1), (math.nan, 1)])
def test_status_says_whether_both_learned_the_same(monkeypatch, tmp_path, capsys, difference, status):
    runs = [
        Run(Training(1, 1.0, [0, 1], {"held-out loss": [loss, 2.0]}), PLAIN.memory) for loss in (5.5, 5.5 + difference)
    ]
    monkeypatch.setattr(cli, "run_both", lambda *args: runs)
    assert main(["demo", "--output", str(tmp_path / "new")]) == status
    assert (tmp_path / "new" / "loss.png").exists()
    assert ("the losses differ" in capsys.readouterr().err) == bool(status)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: expected at least 1, got 0"),
        (["--tokens", "1"], "--tokens: expected at least 2, got 1"),
        (["--tokens", "100000000"], "--tokens: expected at most"),
        (["--output", __file__], "--output: "),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    assert main(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tqdm" else object())
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == "demo: tqdm missing: pip install 'memkernels[hf,plot]'\n"


def test_end_to_end(tmp_path, capfd):
    for package in ("transformers", "tqdm", "matplotlib"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install memkernels[hf,plot]")
    sizes = ["--steps", "2", "--tokens", "64", "--layers", "1"]
    assert main(["demo", *sizes, "--recompute", "sublayer", "--output", str(tmp_path)]) == 0
    printed = capfd.readouterr()
    assert "peak memory above the model" in printed.out and "held-out loss, step 2" in printed.out
    assert "held-out loss" in printed.err and "recompute='sublayer'" in printed.err
    assert (tmp_path / "memory.png").exists() and (tmp_path / "loss.png").exists()
