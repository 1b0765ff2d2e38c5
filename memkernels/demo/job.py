"""The job: what is trained, and one step of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from memkernels.bench import machine
from memkernels.demo.data import standard_library, windows


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

    @property
    def name(self) -> str:
        return "transformers" if self.recompute is None else "memkernels"


@dataclass(frozen=True)
class Job:
    """A model with its optimizer step, and the text for it: one window a step, and windows held out."""

    model: torch.nn.Module
    step: Callable[[Tensor], None]
    batches: Tensor
    held_out: Tensor


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
    return Job(model, step, batches, windows(held_out, 2, settings.tokens, seed=1))


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
