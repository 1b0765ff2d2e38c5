"""Quantised weights in checkpoints: safetensors files and state dicts of plain tensors, under bitsandbytes' keys.

`nf4_keys` and `int8_keys` have the keys of a weight.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file as save_plain_file
from torch import Tensor

from memkernels.atomic import write_atomically
from memkernels.quant import int8_keys, nf4_keys
from memkernels.quant.int8 import Int8Tensor
from memkernels.quant.nf4 import NF4Tensor
from memkernels.quant.state_dict import StateDict


def to_plain(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with each quantised weight as bitsandbytes' keys and plain tensors.

    They do not tell the dtype of the values of a weight in int8.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if isinstance(tensor, NF4Tensor):
            plain |= nf4_keys.split(name, tensor)
        elif isinstance(tensor, Int8Tensor):
            plain |= int8_keys.split(name, tensor)
        else:
            plain[name] = tensor
    return plain


def from_plain(
    state_dict: Mapping[str, Tensor],
    source: str = "state_dict",
    int8_dtypes: Mapping[str, torch.dtype] | None = None,
) -> dict[str, Tensor]:
    """The inverse of `to_plain`: bitsandbytes' keys become quantised weights, everything else stays.

    Args:
        source: the name of the file, for errors.
        int8_dtypes: by name, those of the values of weights in int8; float16, which bitsandbytes quantises, where there
            is none. `.to(dtype)` changes them later.

    Raises:
        ValueError: a key is missing, or what it holds does not fit; the message names source and key.
    """
    checked = StateDict(dict(state_dict), source)
    nf4_keys.check_supported(checked)
    for name in nf4_keys.names(state_dict):
        checked.tensors[name] = nf4_keys.joined(name, checked)
    for name in int8_keys.names(state_dict):
        checked.tensors[name] = int8_keys.joined(name, checked, (int8_dtypes or {}).get(name, torch.float16))
    return checked.tensors


def keys_of(name: str, keys: Container[str]) -> list[str]:
    """Those of `keys` under which a quantised weight of this name is stored, its own first; none of a dense one."""
    besides = [key for key in (*nf4_keys.besides(name), *int8_keys.besides(name)) if key in keys]
    return [name, *besides] if besides else []


def save_file(state_dict: Mapping[str, Tensor], path: str | PathLike[str]) -> None:
    """Writes a state dict with quantised weights as a safetensors file that bitsandbytes and Transformers read.

    Beside its place and then moved there, so that it is the old file or the new one and never a part.
    """
    plain = {name: tensor.detach().contiguous() for name, tensor in to_plain(state_dict).items()}
    header = {"format": "pt"} | int8_keys.header(state_dict)
    write_atomically(Path(path), lambda file: save_plain_file(plain, file, metadata=header))


def load_file(path: str | PathLike[str], device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Reads what `save_file` or bitsandbytes wrote: `model.load_state_dict(load_file(path), assign=True)`.

    By that a weight has a gradient if the one before it had, which a quantised one has not: the model, or those of its
    weights, are frozen first, by `requires_grad_(False)`. The values of a weight in int8 that bitsandbytes wrote are of
    float16; `.to(dtype)` changes that.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or cut off, or a quantised weight's tensors do not fit each other; the message
            names file and key.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is no mapping
            header = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from error
    return from_plain(tensors, str(path), int8_keys.dtypes(header, StateDict(tensors, str(path))))
