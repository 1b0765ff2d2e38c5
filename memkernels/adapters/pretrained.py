"""`load_base`: a model's weights from its files, quantised as they are read, so that the dense model never exists."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from memkernels._library import FLOATING
from memkernels.adapters.base import check_base, replace_conv1d
from memkernels.adapters.layers import ALL_LINEAR, chosen_layers, folder_of
from memkernels.adapters.shards import Shards, find_shards
from memkernels.nn.lora_linear import is_conv1d
from memkernels.ops.checks import check_module
from memkernels.quant.checkpoint import from_plain, keys_of
from memkernels.quant.nf4 import quantize_nf4


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Models that are built within have parameters without storage, on the meta device; their buffers are real.

    So `load_base` can fill them. It is for one thread, since torch's hook on parameters is for all modules.
    """

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        handle.remove()


def load_base(
    model: nn.Module,
    directory: str | os.PathLike,
    targets: str | Iterable[str] = ALL_LINEAR,
    base: str | None = "nf4",
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Fills a model without storage from the files of a Hugging Face model, a tensor at a time, and freezes it.

    Each is read through its file's memory map, which is closed after it, and the weights of `targets` are quantised
    from there: beside the model as it is then, memory holds one tensor of the file, of a Conv1D two, which becomes the
    torch.nn.Linear that computes the same. `lora` with the same targets puts adapters on them. Weights that the files
    have in bitsandbytes' NF4 or 8 bits stay so, whatever `targets` and `base` are. Keys of the files that the model has
    not are passed over.

    Args:
        model: built within `parameters_on_meta()`.
        directory: holds model.safetensors, or model.safetensors.index.json and the files that it names.
        targets: as `lora` has it: linear layers whose weights are quantised.
        base: "nf4", or None: none is quantised that is not in the files.
        dtype: of the model; quantised weights have their values in it.

    Raises:
        TypeError: model is not a torch.nn.Module, directory no path, or dtype is not float32, bfloat16 or float16.
        FileNotFoundError: a file is missing.
        ValueError: base is unknown; a target that matches no layer; a tensor of the model that has storage already, or
            a buffer on the meta device that no file holds; a file that is damaged or cut off, lacks a tensor, or has
            one of another shape or dtype, with an element that is not finite, or quantised where its parts do not fit
            each other: file and key are named. The model is unchanged.
    """
    check_module(model)
    check_base(base)
    if dtype not in FLOATING:
        raise TypeError(f"dtype: expected float32, bfloat16 or float16, got {dtype}.")
    quantized = set() if base is None else {f"{name}.weight" for name in chosen_layers(model, targets)}
    shards = find_shards(folder_of(directory))
    wanted = [_found(model, of, shards, quantized) for of in _tensors(model)]
    # Dense ones first: memory holds two of one, and is emptiest then.
    values = [(of, _read(of, shards, dtype)) for of in sorted(wanted, key=lambda of: of.quantized)]
    for of, value in values:
        _assign(model, of, value)


# By safetensors' names.
_FLOATS = ("F32", "BF16", "F16")
_WHOLE = ("BOOL", "U8", "I8", "I16", "I32", "I64")


@dataclass(frozen=True)
class _Wanted:
    """A tensor of the model, under all its names, with the key by which the files have it.

    `stored`: the keys by which they have it quantised, if they do. `conv1d`: quantised, it becomes a Linear's.
    """

    names: list[str]
    key: str
    shape: tuple[int, ...]
    is_buffer: bool
    quantized: bool
    stored: list[str]
    conv1d: bool = False


def _tensors(model: nn.Module) -> list[tuple[list[str], Tensor]]:
    """The tensors of the model's state_dict, each with all its names."""
    names: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), ([], tensor))[0].append(name)
    for name, buffer in model.named_buffers():
        if buffer.is_meta and id(buffer) not in names:
            raise ValueError(
                f"model: {name}: expected a buffer with values, which no file holds, got one on the meta device: "
                "build the model within parameters_on_meta()."
            )
    return list(names.values())


def _found(model: nn.Module, of: tuple[list[str], Tensor], shards: Shards, quantized: set[str]) -> _Wanted:
    names, tensor = of
    is_buffer = not isinstance(tensor, nn.Parameter)
    if not tensor.is_meta and not is_buffer:
        raise ValueError(f"model: {names[0]}: expected a parameter on the meta device, got one on {tensor.device}.")
    key = next((name for name in names if name in shards.files), None)
    if key is None:
        raise ValueError(f"{shards.listing}: {names[0]}: missing.")
    stored, whole = keys_of(key, shards.files), tuple(tensor.shape)
    if stored and not is_buffer:
        return _Wanted(names, key, whole, is_buffer, True, stored)
    shape, dtype = shards.shape_and_dtype(key)
    if shape != whole:
        raise ValueError(f"{shards.files[key]}: {key}: expected shape {whole}, got {shape}.")
    # One that is also something else's, as a head tied to the embedding is, stays dense.
    quantizes = quantized.issuperset(names)
    if dtype not in _FLOATS and not (dtype == "F64" and not quantizes) and not (is_buffer and dtype in _WHOLE):
        raise ValueError(f"{shards.files[key]}: {key}: expected float32, bfloat16 or float16, got {dtype}.")
    conv1d = quantizes and is_conv1d(model.get_submodule(names[0].rpartition(".")[0]))
    return _Wanted(names, key, whole, is_buffer, quantizes, [], conv1d)


def _read(of: _Wanted, shards: Shards, dtype: torch.dtype) -> Tensor:
    if of.stored:
        return _read_quantized(of, shards, dtype)
    with shards.read(of.key) as stored:
        if not stored.is_floating_point():
            return stored.clone()
        if stored.numel() and not torch.stack(stored.aminmax()).isfinite().all():
            raise ValueError(f"{shards.files[of.key]}: {of.key}: expected finite values.")
        if not of.quantized:
            return stored.to(dtype, copy=True)
        return quantize_nf4(stored.t().contiguous() if of.conv1d else stored).to(dtype)


def _read_quantized(of: _Wanted, shards: Shards, dtype: torch.dtype) -> Tensor:
    tensors, file = {}, str(shards.files[of.key])
    for key in of.stored:
        with shards.read(key) as stored:
            tensors[key] = stored.clone()
    weight = from_plain(tensors, file, {of.key: dtype})[of.key]
    if tuple(weight.shape) != of.shape:
        raise ValueError(f"{file}: {of.key}: expected shape {of.shape}, got {tuple(weight.shape)}.")
    return weight.to(dtype)


def _assign(model: nn.Module, of: _Wanted, value: Any) -> None:
    if of.conv1d:
        replace_conv1d(model, model.get_submodule(of.names[0].rpartition(".")[0]), value)
        return
    tensor: Any = value if of.is_buffer else nn.Parameter(value, requires_grad=False)
    for name in of.names:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, tensor)
