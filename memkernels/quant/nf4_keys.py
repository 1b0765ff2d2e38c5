"""NF4 weights in state dicts: the keys and tensors of bitsandbytes' Linear4bit.

A weight "w" is stored as "w" (packed, (bytes, 1) uint8), "w.absmax", "w.quant_map", "w.nested_absmax" and
"w.nested_quant_map" where nested, and "w.quant_state.bitsandbytes__nf4": the rest as JSON, its bytes a uint8 tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from memkernels.quant.nf4 import BLOCK_SIZES, NF4Encoding, NF4Tensor
from memkernels.quant.reference import NESTED_BLOCK, NF4_VALUES
from memkernels.quant.state_dict import StateDict

_STATE = ".quant_state.bitsandbytes__nf4"
_OTHER_STATE = ".quant_state.bitsandbytes__fp4"


def split(name: str, tensor: NF4Tensor) -> dict[str, Tensor]:
    """A weight as plain tensors."""
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


def besides(name: str) -> tuple[str, ...]:
    """The keys of a weight beside its own, in FP4 too."""
    tensors = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
    return tuple(name + suffix for suffix in (*tensors, _STATE, _OTHER_STATE))


def names(keys: Iterable[str]) -> list[str]:
    """The names of the weights that are stored in NF4."""
    return [key.removesuffix(_STATE) for key in keys if key.endswith(_STATE)]


def joined(name: str, state_dict: StateDict) -> NF4Tensor:
    """The weight of these keys, which are taken out of the state dict."""
    state = _state(name + _STATE, state_dict)
    size, block_size = math.prod(state["shape"]), state["blocksize"]
    blocks = -(-size // block_size)
    nested = "nested_offset" in state
    encoding = NF4Encoding(tuple(state["shape"]), state["dtype"], block_size, nested)

    def take(suffix: str, dtype: torch.dtype, size: int) -> Tensor:
        return state_dict.take(name + suffix, dtype, size, "in NF4")

    if name in state_dict.tensors:  # it may be stored as elements of another dtype
        state_dict.tensors[name] = state_dict.tensors[name].contiguous().view(-1).view(torch.uint8)
    packed = take("", torch.uint8, (size + 1) // 2)
    absmax = take(".absmax", torch.uint8 if nested else torch.float32, blocks)
    values = take(".quant_map", torch.float32, len(NF4_VALUES))
    known = torch.allclose(values, values.new_tensor(NF4_VALUES), rtol=0, atol=1e-6)
    state_dict.check(known, f"{name}.quant_map", "expected the values of NF4")
    if not nested:
        return NF4Tensor(encoding, (packed, absmax))
    nested_absmax = take(".nested_absmax", torch.float32, -(-blocks // NESTED_BLOCK))
    code = take(".nested_quant_map", torch.float32, 256)
    offset = nested_absmax.new_tensor(state["nested_offset"])
    return NF4Tensor(encoding, (packed, absmax, nested_absmax, code, offset))


def check_supported(state_dict: StateDict) -> None:
    """That no weight is in bitsandbytes' other format of 4 bits."""
    for key in state_dict.tensors:
        state_dict.check(
            not key.endswith(_OTHER_STATE), key, "the weight is in FP4, which is not supported; expected NF4"
        )


def _state(key: str, state_dict: StateDict) -> dict[str, Any]:
    """What the JSON says, checked."""
    stored = state_dict.tensors.pop(key)
    try:
        state = json.loads(bytes(stored.cpu().tolist()))
    except (ValueError, TypeError) as error:
        state_dict.check(False, key, f"expected JSON as bytes: {error}")
    state_dict.check(isinstance(state, dict), key, f"expected a JSON object, got {state!r}")
    state_dict.check(state.get("quant_type") == "nf4", key, f"expected quant_type nf4, got {state.get('quant_type')!r}")
    state_dict.check(
        state.get("blocksize") in BLOCK_SIZES,
        key,
        f"expected a blocksize of {BLOCK_SIZES}, got {state.get('blocksize')!r}",
    )
    state["dtype"] = state_dict.dtype(key, state.get("dtype"))
    shape = state.get("shape")
    whole = isinstance(shape, list) and bool(shape) and all(type(n) is int and n >= 0 for n in shape)
    state_dict.check(whole, key, f"expected a shape of whole numbers, got {shape!r}")
    if "nested_offset" in state or "nested_blocksize" in state:
        size, offset = state.get("nested_blocksize"), state.get("nested_offset")
        state_dict.check(size == NESTED_BLOCK, key, f"expected nested_blocksize {NESTED_BLOCK}, got {size!r}")
        finite = isinstance(offset, (int, float)) and math.isfinite(offset)
        state_dict.check(finite, key, f"expected a finite nested_offset, got {offset!r}")
    return state
