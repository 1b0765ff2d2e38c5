"""PEFT's adapter_model.safetensors: keys, and tensors by layer, checked."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SUFFIXES = {
    "lora_A": ".lora_A.weight",
    "lora_B": ".lora_B.weight",
    "lora_magnitude_vector": ".lora_magnitude_vector",
}


def key_of(layer: str, kind: str) -> str:
    """The key of a layer's lora_A, lora_B or lora_magnitude_vector."""
    return f"{_PREFIX}{layer}{_SUFFIXES[kind]}"


def read_tensors(file: Path) -> dict[str, dict[str, Tensor]]:
    """By name of a layer, its lora_A, lora_B and lora_magnitude_vector, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated or no safetensors file, or a key is none of an adapter, or of values that are not
            finite; file and key are named.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file.")
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file}: truncated, or no safetensors file: {error}") from None
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind = next((kind for kind, suffix in _SUFFIXES.items() if key.endswith(suffix)), None)
        if kind is None or not key.startswith(_PREFIX):
            raise ValueError(f"{file}: {key}: not a key of a linear layer's LoRA adapter.")
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ValueError(f"{file}: {key}: expected a floating dtype, got {tensor.dtype}.")
        if not tensor.isfinite().all():
            raise ValueError(f"{file}: {key}: expected finite values.")
        layers.setdefault(key[len(_PREFIX) : -len(_SUFFIXES[kind])], {})[kind] = tensor
    if not layers:
        raise ValueError(f"{file}: it holds no adapter.")
    return layers


def check_tensors(file: Path, layer: str, tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    """That a layer has every tensor of `shapes`, and no other.

    Raises:
        ValueError: file and key are named.
    """
    for kind, shape in shapes.items():
        key = key_of(layer, kind)
        if kind not in tensors:
            raise ValueError(f"{file}: {key}: missing.")
        if tuple(tensors[kind].shape) != shape:
            raise ValueError(f"{file}: {key}: expected shape {shape}, got {tuple(tensors[kind].shape)}.")
    for kind in tensors:
        if kind not in shapes:
            raise ValueError(f"{file}: {key_of(layer, kind)}: the configuration has no use_dora.")
