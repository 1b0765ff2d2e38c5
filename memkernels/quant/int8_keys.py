"""Weights in int8 in state dicts: the keys and tensors of bitsandbytes' Linear8bitLt.

A weight "layer.weight" is stored as "layer.weight" (its codes, int8), "layer.SCB" (a row's absmax each, float32) and
"layer.weight_format" (0: by rows); one of another name, as experts' "gate_up_proj", as that and "gate_up_proj_SCB".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from memkernels.quant.int8 import Int8Encoding, Int8Tensor
from memkernels.quant.state_dict import StateDict

# In the header of a file, since the keys do not tell the dtypes of the weights' values: JSON of them by name.
_DTYPES_KEY = "memkernels.int8_dtypes"


def split(name: str, tensor: Int8Tensor) -> dict[str, Tensor]:
    """A weight as plain tensors."""
    scales_key, format_key = _keys(name)
    plain = {name: tensor.codes.view(tensor.shape), scales_key: tensor.absmax}
    return plain if format_key is None else plain | {format_key: torch.tensor(0, dtype=torch.uint8)}


def names(keys: Iterable[str]) -> list[str]:
    """The names of the weights that are stored in int8."""
    found: dict[str, None] = {}
    for key in keys:
        parent, dot, last = key.rpartition(".")
        if last in ("SCB", "weight_format"):
            found[f"{parent}{dot}weight"] = None
        elif last.endswith("_SCB"):
            found[key.removesuffix("_SCB")] = None
    return list(found)


def joined(name: str, state_dict: StateDict, dtype: torch.dtype) -> Int8Tensor:
    """The weight of these keys, which are taken out of the state dict, with values of dtype."""
    scales_key, format_key = _keys(name)
    state_dict.check(name in state_dict.tensors, name, "missing, though the weight is in int8")
    shape = tuple(state_dict.tensors[name].shape)
    state_dict.check(len(shape) > 0, name, "expected at least one dimension, got a scalar")
    encoding = Int8Encoding(shape, dtype)
    *rows, columns = encoding.codes_shape
    codes = state_dict.take(name, torch.int8, math.prod(rows) * columns, "in int8")
    absmax = state_dict.take(scales_key, torch.float32, math.prod(rows), "in int8")
    stored = None if format_key is None else state_dict.tensors.pop(format_key, None)
    by_rows = stored is None or (stored.numel() == 1 and stored.item() == 0)
    state_dict.check(by_rows, format_key or name, "expected 0, which stands for codes by rows")
    return Int8Tensor(encoding, (codes.view(encoding.codes_shape), absmax.view(rows)))


def header(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """What a file's header says beside its keys."""
    dtypes = {name: str(of.dtype)[6:] for name, of in state_dict.items() if isinstance(of, Int8Tensor)}
    return {_DTYPES_KEY: json.dumps(dtypes)} if dtypes else {}


def dtypes(header: Mapping[str, str], state_dict: StateDict) -> dict[str, torch.dtype]:
    """By name, the dtypes of weights' values that a file's header says; there are none in one of bitsandbytes'.

    Raises:
        ValueError: it is damaged, or names a weight that is not stored in int8.
    """
    try:
        said = json.loads(header.get(_DTYPES_KEY, "{}"))
    except ValueError as error:
        state_dict.check(False, _DTYPES_KEY, f"expected JSON: {error}")
    state_dict.check(isinstance(said, dict), _DTYPES_KEY, f"expected a JSON object, got {said!r}")
    stored = names(state_dict.tensors)
    for name in said:
        state_dict.check(name in stored, _DTYPES_KEY, f"it names {name}, which is not stored in int8")
    return {name: state_dict.dtype(_DTYPES_KEY, dtype) for name, dtype in said.items()}


def besides(name: str) -> tuple[str, ...]:
    """The keys of a weight beside its own."""
    return tuple(key for key in _keys(name) if key is not None)


def _keys(name: str) -> tuple[str, str | None]:
    """Those of the rows' absolute maxima and of the format; the latter only beside a name that ends in "weight"."""
    parent, dot, last = name.rpartition(".")
    return (f"{parent}{dot}SCB", f"{name}_format") if last == "weight" else (f"{name}_SCB", None)
