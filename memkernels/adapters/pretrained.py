"""`load_base`: a model's weights from its files, quantised as they are read, so that the dense model never exists."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from memkernels._library import FLOATING
from memkernels.adapters.base import check_base, replace_conv1d
from memkernels.adapters.experts import chosen_places
from memkernels.adapters.layers import ALL_LINEAR, chosen_layers, folder_of, names_of
from memkernels.adapters.shards import Shards, find_shards
from memkernels.adapters.sources import Source, find_sources
from memkernels.nn.lora_linear import is_conv1d
from memkernels.ops.checks import PLAIN_TENSORS, check_module
from memkernels.quant.checkpoint import from_plain, keys_of
from memkernels.quant.nf4 import quantize_nf4, quantize_nf4_pieces


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
    target_parameters: Iterable[str] = (),
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Fills a model without storage from the files of a Hugging Face model, a tensor at a time, and freezes it.

    Each is read through its file's memory map, which is closed after it, and the weights of `targets` are quantised
    from there: beside the model as it is then, memory holds one tensor of the file, of a Conv1D two, which becomes the
    torch.nn.Linear that computes the same. `lora` with the same targets puts adapters on them. Weights that the files
    have in bitsandbytes' NF4 or 8 bits stay so, whatever `targets` and `base` are. Keys of the files are renamed as
    transformers does, and experts' weights that they have as a matrix an expert become one tensor, a matrix at a time.
    Keys that the model has not are passed over.

    Args:
        model: built within `parameters_on_meta()`.
        directory: holds model.safetensors, or model.safetensors.index.json and the files that it names.
        targets: as `lora` has it: linear layers whose weights are quantised.
        base: "nf4", or None: none is quantised that is not in the files.
        target_parameters: as `lora` has it: experts' weights that are quantised, which need adapters or `patch`, since
            transformers' experts compute with dense ones alone.
        dtype: of the model, but for what transformers keeps in float32; quantised weights have their values in it.

    Raises:
        TypeError: model is not a torch.nn.Module, directory no path, or dtype is not float32, bfloat16 or float16; a
            tensor of the model is not a plain one.
        FileNotFoundError: a file is missing.
        ValueError: base is unknown; a target that matches no layer or no weight of experts; a tensor of the model that
            has storage already, or a buffer on the meta device that no file holds; a file that is damaged or cut off,
            lacks a tensor, or has one of another shape or dtype, with an element that is not finite, quantised where
            its parts do not fit each other, of one expert, or of which transformers computes others: file and key are
            named. The model is unchanged.
    """
    check_module(model)
    check_base(base)
    if dtype not in FLOATING:
        raise TypeError(f"dtype: expected float32, bfloat16 or float16, got {dtype}.")
    chosen = chosen_layers(model, targets)
    layers = [f"{name}.weight" for name, layer in chosen.items() if not isinstance(layer, nn.Embedding)]
    experts = [place.name for place in chosen_places(model, names_of("target_parameters", target_parameters))]
    quantized = set() if base is None else {*layers, *experts}
    shards = find_shards(folder_of(directory))
    sources = find_sources(model, shards)
    wanted = [_found(model, of, shards, sources, quantized) for of in _tensors(model)]
    # Dense ones first: memory holds two of one, and is emptiest then.
    wide = _kept_wide(model, dtype)
    values = [
        (of, _read(of, shards, torch.float32 if not of.quantized and wide(of.names[0]) else dtype))
        for of in sorted(wanted, key=lambda of: of.quantized)
    ]
    for of, value in values:
        _assign(model, of, value)


# By safetensors' names.
_FLOATS = ("F32", "BF16", "F16")
_WHOLE = ("BOOL", "U8", "I8", "I16", "I32", "I64")


@dataclass(frozen=True)
class _Wanted:
    """A tensor of the model, under all its names, and where the files have it.

    `stored`: the keys by which they have it quantised, if they do. `conv1d`: quantised, it becomes a Linear's.
    """

    names: list[str]
    source: Source
    shape: tuple[int, ...]
    is_buffer: bool
    quantized: bool
    stored: list[str]
    conv1d: bool = False


def _kept_wide(model: nn.Module, dtype: torch.dtype) -> Callable[[str], object]:
    """Whether transformers keeps a tensor in float32 in a model of this dtype, by its name."""
    attributes = {
        torch.float16: ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"),
        torch.bfloat16: ("_keep_in_fp32_modules_strict",),
    }.get(dtype, ())
    kept = [name.replace("*", ".*") for of in attributes for name in getattr(model, of, None) or ()]
    return re.compile("|".join(kept) or r"(?!)").search


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


def _found(
    model: nn.Module, of: tuple[list[str], Tensor], shards: Shards, sources: dict[str, Source], quantized: set[str]
) -> _Wanted:
    names, tensor = of
    is_buffer = not isinstance(tensor, nn.Parameter)
    if type(tensor) not in PLAIN_TENSORS:
        raise TypeError(f"model: {names[0]}: expected a plain tensor, got a {type(tensor).__name__}.")
    if not tensor.is_meta and not is_buffer:
        raise ValueError(f"model: {names[0]}: expected a parameter on the meta device, got one on {tensor.device}.")
    source = next((sources[name] for name in names if name in sources), None)
    if source is None:
        raise ValueError(f"{shards.listing}: {names[0]}: missing.")
    whole = tuple(tensor.shape)
    # One that is also something else's, as a head tied to the embedding is, stays dense.
    quantizes = quantized.issuperset(names)
    if source.experts:
        _check_experts(source, whole, shards, quantizes)
        return _Wanted(names, source, whole, is_buffer, quantizes, [])
    stored = keys_of(source.key, shards.files)
    if stored and not is_buffer:
        return _Wanted(names, source, whole, is_buffer, True, stored)
    shape, dtype = shards.shapes_and_dtypes[source.key]
    _check_shape(source.key, whole, shape, shards)
    if not (is_buffer and dtype in _WHOLE):
        _check_dtype(source.key, dtype, shards, quantizes)
    conv1d = quantizes and is_conv1d(model.get_submodule(names[0].rpartition(".")[0]))
    return _Wanted(names, source, whole, is_buffer, quantizes, [], conv1d)


def _check_experts(source: Source, shape: tuple[int, ...], shards: Shards, quantizes: bool) -> None:
    """That each expert's matrices are dense, and lie below each other in `shape`, (E, out, in)."""
    for keys in source.experts:
        expected = (shape[1] // len(keys), *shape[2:])
        for key in keys:
            if keys_of(key, shards.files):
                raise ValueError(
                    f"{shards.files[key]}: {key}: expected a dense matrix, got a quantised one of an expert."
                )
            matrix, dtype = shards.shapes_and_dtypes[key]
            _check_shape(key, expected, matrix, shards)
            _check_dtype(key, dtype, shards, quantizes)


def _check_shape(key: str, expected: tuple[int, ...], shape: tuple[int, ...], shards: Shards) -> None:
    if shape != expected:
        raise ValueError(f"{shards.files[key]}: {key}: expected shape {expected}, got {shape}.")


def _check_dtype(key: str, dtype: str, shards: Shards, quantizes: bool) -> None:
    if dtype not in _FLOATS and (quantizes or dtype != "F64"):
        raise ValueError(f"{shards.files[key]}: {key}: expected float32, bfloat16 or float16, got {dtype}.")


def _read(of: _Wanted, shards: Shards, dtype: torch.dtype) -> Tensor:
    if of.stored:
        return _read_quantized(of, shards, dtype)
    if of.source.experts:
        return _read_experts(of, shards, dtype)
    with _finite(of.source.key, shards) as stored:
        if not stored.is_floating_point():
            return stored.clone()
        if not of.quantized:
            return stored.to(dtype, copy=True)
        return quantize_nf4(stored.t().contiguous() if of.conv1d else stored).to(dtype)


def _read_experts(of: _Wanted, shards: Shards, dtype: torch.dtype) -> Tensor:
    if of.quantized:
        return quantize_nf4_pieces(_matrices(of.source, shards), of.shape, dtype)
    whole = torch.empty(of.shape, dtype=dtype)
    of_expert = len(of.source.experts[0])
    for place, matrix in zip(
        whole.unflatten(1, (of_expert, -1)).flatten(0, 1), _matrices(of.source, shards), strict=True
    ):
        place.copy_(matrix)
    return whole


def _matrices(source: Source, shards: Shards) -> Iterator[Tensor]:
    """In the order of the tensor's rows, each in its file's memory map until the next."""
    for keys in source.experts:
        for key in keys:
            with _finite(key, shards) as matrix:
                yield matrix


@contextmanager
def _finite(key: str, shards: Shards) -> Iterator[Tensor]:
    """`Shards.read` of a tensor whose elements are finite."""
    with shards.read(key) as stored:
        if stored.is_floating_point() and stored.numel() and not torch.stack(stored.aminmax()).isfinite().all():
            raise ValueError(f"{shards.files[key]}: {key}: expected finite values.")
        yield stored


def _read_quantized(of: _Wanted, shards: Shards, dtype: torch.dtype) -> Tensor:
    key = of.source.key
    tensors, file = {}, str(shards.files[key])
    for each in of.stored:
        with shards.read(each) as stored:
            tensors[each] = stored.clone()
    weight = from_plain(tensors, file, {key: dtype})[key]
    _check_shape(key, of.shape, tuple(weight.shape), shards)
    return weight.to(dtype)


def _assign(model: nn.Module, of: _Wanted, value: Any) -> None:
    if of.conv1d:
        replace_conv1d(model, model.get_submodule(of.names[0].rpartition(".")[0]), value)
        return
    tensor: Any = value if of.is_buffer else nn.Parameter(value, requires_grad=False)
    for name in of.names:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, tensor)
