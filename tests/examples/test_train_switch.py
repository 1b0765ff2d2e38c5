"""The Switch example at a small size: what it trains, counts, prints and draws."""

import csv
import importlib
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    pytest.importorskip("tqdm", reason="tqdm is not installed: pip install memkernels[hf]")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("train_switch")


@pytest.fixture
def shape(example):
    return example.Shape(width=16, feed_forward=32, layers=2, heads=2, experts=4)


def text(count=4000, seed=0):
    """Bytes that repeat, so that there is something to learn."""
    pattern = torch.randint(256, (97,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return pattern.repeat(count // 97 + 1)[:count]


def test_sparse_and_dense_learn_and_are_compared(example, shape, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install memkernels[plot]")
    settings = example.Settings(steps=30, batch=4, tokens=32, warmup=5, checkpoints=3, learning_rate=1e-2)
    factors = (None, *example.CAPACITY_FACTORS)
    curves = [example.train(shape, factor, settings, text(), text()) for factor in factors]
    for curve in curves:
        assert curve.steps == [10, 20, 30] and curve.losses[-1] < curve.losses[0] < 7
    dense, *sparse = curves
    assert not dense.load and dense.reaches(dense.losses[-1]) <= 30 and dense.reaches(0.0) is None
    for curve in sparse:
        assert curve.parameters > dense.parameters
        torch.testing.assert_close(torch.stack(curve.load).sum(1), torch.ones(30))
    assert sparse[0].dropped[0] >= sparse[-1].dropped[0]  # the same router, a larger capacity
    printed = example.table(curves)
    assert all(curve.name in printed for curve in curves)
    assert example.draw(curves, tmp_path).stat().st_size > 10_000
    assert printed in example.write_table(curves, tmp_path).read_text()
    with example.write_checkpoints(curves, tmp_path).open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = [(curve, place) for curve in curves for place in range(3)]
    for row, (curve, place) in zip(rows, expected, strict=True):
        assert (row["model"], int(row["step"])) == (curve.name, curve.steps[place])
        assert float(row["held_out_loss"]) == pytest.approx(curve.losses[place], rel=1e-5)
        load = [row[f"expert_{expert}"] for expert in range(4)]
        if curve is dense:
            assert row["dropped"] == "" and load == [""] * 4
        else:
            since = slice(10 * place, 10 * place + 10)
            assert float(row["dropped"]) == pytest.approx(sum(curve.dropped[since]) / 10, rel=1e-5)
            assert list(map(float, load)) == pytest.approx(torch.stack(curve.load[since]).mean(0).tolist(), rel=1e-5)


def test_a_byte_is_predicted_from_those_before_it(example, shape):
    """With a capacity that drops nothing; dropping looks at the batch."""
    torch.manual_seed(0)
    model = importlib.import_module("switch_model").SwitchLanguageModel(shape, 4.0).eval()
    model.head.options["reduction"] = "none"
    one = text(33).long()[None]
    other = one.clone()
    other[0, 20:] = 7
    losses, others = (model(batch)[0].view(-1) for batch in (one, other))
    torch.testing.assert_close(losses[:19], others[:19])
    assert not torch.isclose(losses[19], others[19])


def test_a_number_of_steps_that_is_none_is_refused(example, capsys):
    assert example.main(["--steps", "0"]) == 2
    assert "--steps: expected a positive number, got 0" in capsys.readouterr().err


def test_an_output_that_is_no_folder_is_refused_before_anything_is_trained(example, capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install memkernels[plot]")
    monkeypatch.setattr(example, "unmet", lambda *_: None)
    monkeypatch.setattr(example, "standard_library", lambda: pytest.fail("it went on"))
    path = tmp_path / "file"
    path.touch()
    assert example.main(["--output", str(path)]) == 2
    assert f"--output: expected a folder to write to, got {path}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "sparse, expected",
    [
        ([[3.0, 1.0, 1.0], [3.0, 2.0, 1.0]], True),
        ([[3.0, 1.0, 1.0], [3.0, 3.0, 2.0]], False),  # one as late as the dense model
        ([[3.0, 1.0, 1.0], [3.0, 3.0, 3.0]], False),
        ([[3.0, 1.0, 1.0], [3.0, float("nan"), float("nan")]], False),
    ],
)
def test_the_ordering_is_of_steps_and_of_each_sparse_model(example, sparse, expected):
    curves = [example.Curve("", 0, [10, 20, 30], losses) for losses in ([3.0, 2.5, 2.0], *sparse)]
    assert example.in_fewer_steps(curves) is expected
