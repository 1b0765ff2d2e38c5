"""PEFT's adapter_model.safetensors: keys, and tensors by layer, checked."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from memkernels.ops.checks import PLAIN_TENSORS

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SUFFIXES = {
    "lora_A": ".lora_A.weight",
    "lora_B": ".lora_B.weight",
    "lora_embedding_A": ".lora_embedding_A",
    "lora_embedding_B": ".lora_embedding_B",
    "lora_magnitude_vector": ".lora_magnitude_vector",
}
# What PEFT writes again of modules_to_save where the vocabulary was extended, or with bias="all".
_COPIES = (".modules_to_save.", ".original_module.")


def key_of(layer: str, kind: str) -> str:
    """The key of a layer's tensor of a kind: lora_A, lora_embedding_A, lora_magnitude_vector."""
    return f"{_PREFIX}{layer}{_SUFFIXES[kind]}"


def key_beside(name: str) -> str:
    """The key of another tensor of the model than an adapter's."""
    return f"{_PREFIX}{name}"


def read_tensors(file: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """By name of a layer, its lora_A, lora_B and others by kind; and others by their names; on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated or no safetensors file, or a key is none of PEFT's, or of values that are not
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
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not key.startswith(_PREFIX):
            raise ValueError(f"{file}: {key}: not a key of PEFT's, which begin with {_PREFIX}")
        kind = next((kind for kind, suffix in _SUFFIXES.items() if key.endswith(suffix)), None)
        floats = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        if (kind is not None or tensor.is_floating_point()) and tensor.dtype not in floats:
            raise ValueError(f"{file}: {key}: expected a floating dtype, got {tensor.dtype}.")
        if not tensor.isfinite().all():
            raise ValueError(f"{file}: {key}: expected finite values.")
        if kind is None:
            if not any(of in key for of in _COPIES):
                others[key.removeprefix(_PREFIX)] = tensor
            continue
        layers.setdefault(key[len(_PREFIX) : -len(_SUFFIXES[kind])], {})[kind] = tensor
    if not layers:
        raise ValueError(f"{file}: it holds no adapter.")
    return layers, others


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
            reason = "the configuration has no use_dora" if "magnitude" in kind else "its layer is of another kind"
            raise ValueError(f"{file}: {key_of(layer, kind)}: {reason}.")


def check_beside(
    file: Path, others: dict[str, Tensor], expected: dict[str, Tensor], allowed: dict[str, Tensor]
) -> None:
    """That of the tensors beside adapters the file has those of `expected`, of the model, and no other but `allowed`.

    Raises:
        ValueError: file and key are named.
    """
    for name in expected:
        if name not in others:
            raise ValueError(f"{file}: {key_beside(name)}: missing, though the configuration has it trained.")
    for name, given in others.items():
        own = expected.get(name, allowed.get(name))
        if own is None:
            raise ValueError(f"{file}: {key_beside(name)}: not a key of a linear layer's or embedding's LoRA adapter.")
        if type(own) not in PLAIN_TENSORS:
            raise ValueError(f"{file}: {key_beside(name)}: the model's is no plain tensor, but {type(own).__name__}.")
        if given.shape != own.shape or given.is_floating_point() != own.is_floating_point():
            raise ValueError(
                f"{file}: {key_beside(name)}: expected shape {tuple(own.shape)} and a dtype as {own.dtype}, got "
                f"{tuple(given.shape)} and {given.dtype}."
            )
