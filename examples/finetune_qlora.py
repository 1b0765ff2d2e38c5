"""QLoRA of a language model of 1.1 billion parameters in less than 2 GB of memory, on any CPU.

    pip install --no-build-isolation ".[hf]"
    python examples/finetune_qlora.py
    python examples/finetune_qlora.py --checkpoint PATH      # a Hugging Face model of your own

The model has the shape of TinyLlama: d=2048, f=5632, 22 layers, 32 heads with 4 for keys, a vocabulary of 32000. Its
weights are random, written once to a file, or those of --checkpoint. They are read through the file's memory map, a
tensor at a time, and quantised to NF4 from there, unless bitsandbytes did that; the dense model, 2.2 GB, never exists.
LoRA adapters of rank 16 on every linear layer, of which a mixture's experts are none, learn Python's standard library,
1024 tokens a step: its bytes, or with --checkpoint what the model's own tokenizer makes of it. They are saved as PEFT's
two files.

What memory holds, in MB, of the random model:

    Python, torch, transformers                          450
    weights of the layers, 4.13 bits each                500
    embedding and head, bfloat16, frozen                 262
    adapters, 12.6 million, gradients, two moments       202
    kept for backward: 2 d + 32 heads' lse a token       188
    one layer's backward, loss: tiles                    100
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from random_llama import write_random_llama
from torch import Tensor

import memkernels
from memkernels.bench import machine
from memkernels.demo.data import standard_library, standard_library_files, windows
from memkernels.demo.job import LOSS, Job
from memkernels.demo.requirements import unmet
from memkernels.demo.train import train


@dataclass(frozen=True)
class Shape:
    """Of the random model."""

    width: int = 2048
    feed_forward: int = 5632
    layers: int = 22
    heads: int = 32
    key_heads: int = 4
    vocabulary: int = 32000


def main(arguments: Sequence[str] | None = None, shape: Shape = Shape()) -> int:
    """Trains, saves and prints; returns 2 where it cannot run."""
    parser = argparse.ArgumentParser(description="Fine-tune a language model by QLoRA in less than 2 GB.")
    parser.add_argument("--checkpoint", type=Path, help="directory of a Hugging Face model: config.json, safetensors")
    parser.add_argument("--steps", type=int, default=20, help="training steps")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of text in a step")
    parser.add_argument("--output", type=Path, default=Path("qlora"), help="directory of the adapter")
    args = parser.parse_args(arguments)
    for option in ("steps", "tokens"):
        if getattr(args, option) < 1:
            return _refuse(f"--{option}: expected a positive number, got {getattr(args, option)}")
    if reason := unmet(("transformers", "tqdm"), "hf"):
        return _refuse(reason)
    return_freed_memory()
    machine.set_threads()
    print(machine.describe(), flush=True)
    try:
        job = make_job(args.checkpoint, args.output, args.steps, args.tokens, shape)
    except (OSError, ValueError) as error:
        return _refuse(str(error))
    training = train(job)
    memkernels.save_adapter(job.model, args.output)
    losses = ", ".join(
        f"{loss:.3f} after {step}" for step, loss in zip(training.checkpoints, training.losses, strict=True)
    )
    print(f"held-out loss in steps: {losses}; {training.step_seconds:.3g} s a step")
    print(f"adapter: {args.output}")
    print(f"peak resident memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6:.0f} MB")
    return 0


def make_job(checkpoint: Path | None, output: Path, steps: int, tokens: int, shape: Shape = Shape()) -> Job:
    """The model, quantised and patched, with its text; says what was adapted and what was patched.

    Raises:
        OSError: a file is missing.
        ValueError: a file that does not fit or is damaged; a model that memkernels knows not; too little text.
    """
    folder = output / "base" if checkpoint is None else checkpoint
    if checkpoint is None:
        write_random_llama(folder, _config(shape))
    model = load_model(folder)
    training, held_out = _bytes(steps, tokens) if checkpoint is None else _tokenized(checkpoint, steps, tokens)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3 if checkpoint is None else 2e-4, fused=True)

    def step(batch: Tensor) -> None:
        model(input_ids=batch[None], labels=batch[None], use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        # A model in training computes the loss without logits; its layers drop nothing in evaluation.
        model.eval().training = True
        loss = model(input_ids=held_out[None], labels=held_out[None], use_cache=False).loss.item()
        model.train()
        return {LOSS: loss}

    return Job("memkernels", model, step, training, evaluate, torch.device("cpu"))


def load_model(folder: Path) -> Any:
    """The model in a directory, its layers' weights in NF4 under adapters of rank 16, patched, in training mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with memkernels.parameters_on_meta():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    experts = ("experts.gate_up_proj", "experts.down_proj")
    found = [of for of in experts if any(name.endswith(of) for name, _ in model.named_parameters())]
    memkernels.load_base(model, folder, target_parameters=found)
    print(memkernels.lora(model, r=16, alpha=32, dropout=0.05, base="nf4"))
    print(memkernels.patch(model, recompute="layer"), flush=True)
    return model.train()


def return_freed_memory() -> None:
    """glibc otherwise keeps freed blocks of up to 32 MB in its heap, for the next of that size."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, size in ((-1, 0), (-3, 1 << 20)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(option, size)


def _config(shape: Shape) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        bos_token_id=None,
        eos_token_id=None,
    )


def _bytes(steps: int, tokens: int) -> tuple[list[Tensor], Tensor]:
    """Windows of bytes to train on, and one held out."""
    text, held_out = standard_library()
    return list(windows(text, steps, tokens, seed=0)), windows(held_out, 1, tokens, seed=1)[0]


def _tokenized(folder: Path, steps: int, tokens: int) -> tuple[list[Tensor], Tensor]:
    """The same of the model's own tokens: the first of the files, one after the other."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def first(files: Sequence[Path], count: int) -> Tensor:
        texts = (path.read_text(encoding="utf-8", errors="replace") for path in files)
        ids = itertools.chain.from_iterable(tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
        found = torch.tensor(list(itertools.islice(ids, count)))
        if len(found) < count:
            raise ValueError(
                f"--steps times --tokens: expected at most {len(found)}, the tokens there are, got {count}"
            )
        return found

    training, held_out = standard_library_files()
    return list(first(training, steps * tokens).view(steps, tokens)), first(held_out, tokens)


def _refuse(message: str) -> int:
    print(f"finetune_qlora: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
