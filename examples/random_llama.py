"""A Llama with random weights as a Hugging Face model's directory, written a tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memkernels.adapters import parameters_on_meta
from memkernels.atomic import write_atomically


def write_random_llama(directory: Path, config: Any) -> None:
    """Writes config.json and model.safetensors, in bfloat16, unless they are there: the latter is the old one or whole.

    Weights are drawn as transformers draws them, from a normal distribution of the configuration's deviation.
    """
    from transformers import LlamaForCausalLM

    weights = directory / "model.safetensors"
    config.save_pretrained(directory)
    if weights.exists():
        return
    with parameters_on_meta():
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    write_atomically(weights, lambda path: _write(path, shapes, config.initializer_range))


def _write(path: Path, shapes: dict[str, torch.Size], deviation: float) -> None:
    """The format is the header's size in 8 bytes, the header in JSON, and the tensors, one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + shape.numel() * torch.bfloat16.itemsize
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in _drawn(shapes, deviation):
            file.write(tensor.view(torch.uint8).numpy().data)


def _drawn(shapes: dict[str, torch.Size], deviation: float) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        tensor = torch.ones(shape, dtype=torch.bfloat16)
        yield tensor if name.endswith("norm.weight") else tensor.normal_(0.0, deviation, generator=generator)
