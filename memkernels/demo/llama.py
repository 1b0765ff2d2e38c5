"""The demo's job: a byte-level Llama that learns the standard library."""

from __future__ import annotations

import statistics
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from memkernels.bench import machine
from memkernels.demo import memory
from memkernels.demo.data import standard_library, windows
from memkernels.demo.job import LOSS, Job, name_of
from memkernels.demo.train import train


@dataclass(frozen=True)
class Settings:
    """A run: `recompute` is that of `memkernels.patch`, or None for plain transformers."""

    recompute: str | None
    steps: int = 20
    tokens: int = 2048
    width: int = 512
    feed_forward: int = 1408
    layers: int = 7
    learning_rate: float = 1e-3


def train_job(settings: dict[str, Any]) -> dict[str, Any]:
    """Trains in this process: a `Training` as a dictionary."""
    return asdict(train(make_job(Settings(**settings))))


def measure_job(settings: dict[str, Any]) -> dict[str, Any]:
    """Measures in this process: a `Memory` as a dictionary."""
    return asdict(memory.measure(make_job(Settings(**settings))))


def make_job(settings: Settings) -> Job:
    """The same weights and text for the same settings, patched or not; says on stderr what was patched."""
    machine.set_threads()
    device = machine.device()
    torch.manual_seed(0)
    model = make_model(settings).to(device)
    if settings.recompute is not None:
        from memkernels import patch

        print(patch(model, recompute=settings.recompute), file=sys.stderr)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, fused=True)

    def step(batch: Tensor) -> None:
        model(input_ids=batch[None], labels=batch[None]).loss.backward()
        optimizer.step()
        # Gradients stay, so that they belong to the model and not to the step that is measured.
        optimizer.zero_grad(set_to_none=False)

    text, held_out = (tensor.to(device) for tensor in standard_library())
    batches = windows(text, settings.steps, settings.tokens, seed=0)
    held_out = windows(held_out, 2, settings.tokens, seed=1)
    return Job(
        name_of(settings.recompute), model, step, batches.unbind(), lambda: {LOSS: mean_loss(model, held_out)}, device
    )


@torch.no_grad()
def mean_loss(model: torch.nn.Module, text: Tensor) -> float:
    """Of windows of text, (count, tokens)."""
    model.eval()
    losses = [model(input_ids=window[None], labels=window[None]).loss.item() for window in text]
    model.train()
    return statistics.fmean(losses)


def make_model(settings: Settings) -> torch.nn.Module:
    """A byte-level Llama in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=settings.width,
        intermediate_size=settings.feed_forward,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.width // 64,
        num_key_value_heads=settings.width // 128,
        max_position_embeddings=settings.tokens,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()
