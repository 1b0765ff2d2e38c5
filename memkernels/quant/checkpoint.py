"""NF4 weights in checkpoints: the keys and tensors of bitsandbytes' Linear4bit, in safetensors files and state dicts.

A weight "w" is stored as "w" (packed, (bytes, 1) uint8), "w.absmax", "w.quant_map", "w.nested_absmax" and
"w.nested_quant_map" where nested, and "w.quant_state.bitsandbytes__nf4": the rest as JSON, its bytes a uint8 tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file as save_plain_file
from torch import Tensor

from memkernels.atomic import write_atomically
from memkernels.ops.quantized.tensor import QuantizedTensor
from memkernels.quant.nf4 import BLOCK_SIZES, NF4Encoding, NF4Tensor
from memkernels.quant.reference import NESTED_BLOCK, NF4_VALUES

_STATE = ".quant_state.bitsandbytes__nf4"
_OTHER_STATE = ".quant_state.bitsandbytes__fp4"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def to_plain(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with each NF4 weight as bitsandbytes' keys and plain tensors.

    Raises:
        TypeError: a quantised weight of another kind.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if isinstance(tensor, QuantizedTensor) and not isinstance(tensor, NF4Tensor):
            raise TypeError(f"{name}: expected NF4, which has a format of its own in checkpoints, got {type(tensor)}.")
        plain |= _split(name, tensor) if isinstance(tensor, NF4Tensor) else {name: tensor}
    return plain


def from_plain(state_dict: Mapping[str, Tensor], source: str = "state_dict") -> dict[str, Tensor]:
    """The inverse of `to_plain`: bitsandbytes' keys become NF4 weights, everything else stays.

    Args:
        source: the name of the file, for errors.

    Raises:
        ValueError: a key is missing, or what it holds does not fit; the message names source and key.
    """
    rest = dict(state_dict)
    for key in state_dict:
        if key.endswith(_OTHER_STATE):
            raise ValueError(f"{source}: {key}: the weight is in FP4, which is not supported; expected NF4.")
        if key.endswith(_STATE):
            name = key.removesuffix(_STATE)
            rest[name] = _joined(name, rest, source)
    return rest


def save_file(state_dict: Mapping[str, Tensor], path: str | PathLike[str]) -> None:
    """Writes a state dict with NF4 weights as a safetensors file that bitsandbytes and Transformers read.

    Beside its place and then moved there, so that it is the old file or the new one and never a part.
    """
    plain = {name: tensor.detach().contiguous() for name, tensor in to_plain(state_dict).items()}
    write_atomically(Path(path), lambda file: save_plain_file(plain, file, metadata={"format": "pt"}))


def load_file(path: str | PathLike[str], device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Reads what `save_file` or bitsandbytes wrote: `model.load_state_dict(load_file(path), assign=True)`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or cut off, or an NF4 weight's tensors do not fit each other; the message names
            file and key.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is no mapping
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from error
    return from_plain(tensors, str(path))


def _split(name: str, tensor: NF4Tensor) -> dict[str, Tensor]:
    encoding = tensor.encoding
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": encoding.block_size,
        "dtype": str(encoding.dtype).removeprefix("torch."),
        "shape": list(encoding.shape),
    }
    packed, absmax, *nested = tensor.parts
    plain = {
        name: packed.view(-1, 1),
        f"{name}.absmax": absmax,
        f"{name}.quant_map": absmax.new_tensor(NF4_VALUES, dtype=torch.float32),
    }
    if nested:
        nested_absmax, nested_code, offset = nested
        plain |= {f"{name}.nested_absmax": nested_absmax, f"{name}.nested_quant_map": nested_code.clone()}
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset.item()}
    plain[name + _STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return plain


def _joined(name: str, tensors: dict[str, Tensor], source: str) -> NF4Tensor:
    """The weight of bitsandbytes' keys, which are taken out of `tensors`."""

    def check(condition: bool, key: str, message: str) -> None:
        if not condition:
            raise ValueError(f"{source}: {key}: {message}.")

    def take(suffix: str, dtype: torch.dtype, size: int) -> Tensor:
        key = name + suffix
        check(key in tensors, key, "missing, though the weight is in NF4")
        tensor = tensors.pop(key)
        check(tensor.dtype == dtype, key, f"expected {dtype}, got {tensor.dtype}")
        check(
            tensor.numel() == size, key, f"expected {size} elements, as the weight's shape says, got {tensor.numel()}"
        )
        finite = not dtype.is_floating_point or bool(tensor.isfinite().all())
        check(finite, key, "expected finite values")
        return tensor.reshape(-1)

    state = _state(name + _STATE, tensors.pop(name + _STATE), check)
    size, block_size = math.prod(state["shape"]), state["blocksize"]
    blocks = -(-size // block_size)
    nested = "nested_offset" in state
    encoding = NF4Encoding(tuple(state["shape"]), _DTYPES[state["dtype"]], block_size, nested)
    if name in tensors:  # it may be stored as elements of another dtype
        tensors[name] = tensors[name].contiguous().view(-1).view(torch.uint8)
    packed = take("", torch.uint8, (size + 1) // 2)
    absmax = take(".absmax", torch.uint8 if nested else torch.float32, blocks)
    values = take(".quant_map", torch.float32, len(NF4_VALUES))
    known = torch.allclose(values, values.new_tensor(NF4_VALUES), rtol=0, atol=1e-6)
    check(known, f"{name}.quant_map", "expected the values of NF4")
    if not nested:
        return NF4Tensor(encoding, (packed, absmax))
    nested_absmax = take(".nested_absmax", torch.float32, -(-blocks // NESTED_BLOCK))
    code = take(".nested_quant_map", torch.float32, 256)
    offset = nested_absmax.new_tensor(state["nested_offset"])
    return NF4Tensor(encoding, (packed, absmax, nested_absmax, code, offset))


def _state(key: str, stored: Tensor, check) -> dict[str, Any]:
    """What the JSON says, checked."""
    try:
        state = json.loads(bytes(stored.cpu().tolist()))
    except (ValueError, TypeError) as error:
        check(False, key, f"expected JSON as bytes: {error}")
    check(isinstance(state, dict), key, f"expected a JSON object, got {state!r}")
    check(state.get("quant_type") == "nf4", key, f"expected quant_type nf4, got {state.get('quant_type')!r}")
    check(
        state.get("blocksize") in BLOCK_SIZES,
        key,
        f"expected a blocksize of {BLOCK_SIZES}, got {state.get('blocksize')!r}",
    )
    check(state.get("dtype") in _DTYPES, key, f"expected a dtype of {', '.join(_DTYPES)}, got {state.get('dtype')!r}")
    shape = state.get("shape")
    whole = isinstance(shape, list) and bool(shape) and all(type(n) is int and n >= 0 for n in shape)
    check(whole, key, f"expected a shape of whole numbers, got {shape!r}")
    if "nested_offset" in state or "nested_blocksize" in state:
        size, offset = state.get("nested_blocksize"), state.get("nested_offset")
        check(size == NESTED_BLOCK, key, f"expected nested_blocksize {NESTED_BLOCK}, got {size!r}")
        finite = isinstance(offset, (int, float)) and math.isfinite(offset)
        check(finite, key, f"expected a finite nested_offset, got {offset!r}")
    return state
