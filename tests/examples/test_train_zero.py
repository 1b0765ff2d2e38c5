"""The example of training on several ranks: what it prints, and how it goes on at another number of them."""

import contextlib
import importlib
import io
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import run_ranks

EXAMPLES = Path(__file__).parents[2] / "examples"


def example():
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module("train_zero")
    finally:
        sys.path.remove(str(EXAMPLES))


def train(steps, stage, folder):
    module, said = example(), io.StringIO()
    module.BATCH, module.TOKENS = 6, 16  # of rows, bytes
    with contextlib.redirect_stdout(said):
        module.train(steps, 2, stage, folder, module.Shape(width=16, feed_forward=32, layers=2, heads=2))
    if dist.get_rank() == 0:
        (folder / f"said{dist.get_world_size()}").write_text(said.getvalue())


def test_it_goes_on_at_another_number_of_ranks(tmp_path):
    run_ranks(train, 1, tmp_path, 4, 1, tmp_path / "whole")
    for ranks, stage, steps in ((2, 2, 2), (3, 1, 4)):
        run_ranks(train, ranks, tmp_path, steps, stage, tmp_path / "parts")
    whole = (tmp_path / "whole" / "said1").read_text().splitlines()
    parts = [line for ranks in (2, 3) for line in (tmp_path / "parts" / f"said{ranks}").read_text().splitlines()]
    assert [line.rpartition(" ")[0] for line in parts] == [f"step {step}: loss" for step in (1, 2, 3, 4)]
    losses = [[float(line.rpartition(" ")[2]) for line in lines] for lines in (whole, parts)]
    assert losses[1] == pytest.approx(losses[0], abs=2e-4)
    assert sorted(path.name for path in (tmp_path / "parts").glob("step*")) == ["step000002", "step000004"]


def test_it_says_how_to_start_it(capsys):
    assert example().main([]) == 2
    assert "torchrun --nproc-per-node 2" in capsys.readouterr().err
