"""bitsandbytes' linear layers of 4 and 8 bits: their weights as `memkernels.quant` has them, in the same memory."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from memkernels.ops.autocast import product_dtype
from memkernels.ops.quantized.tensor import QuantizedTensor
from memkernels.quant.int8 import Int8Encoding, Int8Tensor
from memkernels.quant.nf4 import BLOCK_SIZES, NF4Encoding, NF4Tensor
from memkernels.quant.reference import NESTED_BLOCK

_4BIT, _8BIT = ("Linear4bit", "LinearNF4", "LinearFP4"), ("Linear8bitLt",)


def is_layer(module: Any) -> bool:
    """Whether it is a Linear4bit, one of those that name its quant_type, or a Linear8bitLt."""
    kind = type(module)
    return kind.__module__ == "bitsandbytes.nn.modules" and kind.__name__ in (*_4BIT, *_8BIT)


def why_not(module: Any, x: Tensor | None = None) -> str | None:
    """What keeps an op from taking a layer's weight in a call with x; None where it may.

    Without x, as before any call, a 4-bit layer's counts as of the dtype that the weight had when it was quantised.
    """
    if torch.compiler.is_compiling():
        return "a weight of bitsandbytes under torch.compile"
    return _why_not_8bit(module) if type(module).__name__ in _8BIT else _why_not_4bit(module, x)


def why_unreadable(module: Any) -> str | None:
    """What keeps a layer's weight from being read where it is, whatever the layer computes in; None where it may."""
    return _unreadable_8bit(module) if type(module).__name__ in _8BIT else _unreadable_4bit(module)


def as_linear(module: Any, dtype: torch.dtype | None = None) -> torch.nn.Linear:
    """A torch.nn.Linear over the weight of a layer to which `why_unreadable` has nothing; nothing is copied but a bias.

    Its values and bias come in dtype, for inputs of that dtype. None: in that of the bias or, if there is none, that of
    what was quantised, which is float16 in 8 bits.
    """
    is_8bit = type(module).__name__ in _8BIT
    if dtype is None and module.bias is not None:
        dtype = module.bias.dtype
    dtype = dtype or (torch.float16 if is_8bit else _state(module).dtype)
    weight = _of_8bit(module, dtype) if is_8bit else _of_4bit(module, dtype)
    linear = torch.nn.Linear(module.in_features, module.out_features, bias=False, device="meta").train(module.training)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        linear.bias = torch.nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
    return linear


def values_dtype(module: Any, x: Tensor | None = None) -> torch.dtype | None:
    """The dtype of a linear module's weight, or that in which one of bitsandbytes' computes in a call with x.

    That is a 4-bit layer's compute_dtype; if it has none, as bitsandbytes leaves it until a call, that of what was
    quantised. An 8-bit one computes in that of x: None without one.
    """
    if not is_layer(module):
        return module.weight.dtype
    if type(module).__name__ in _8BIT:
        return None if x is None else product_dtype(x)
    return module.compute_dtype or _state(module).dtype


def has_whole_rows(module: Any) -> bool:
    """Whether a layer's weight may be split by any rows."""
    if type(module).__name__ in _8BIT:
        return True
    state = _state(module)
    return state is not None and module.in_features % state.blocksize == 0


def weight_and_bias(module: Any, x: Tensor) -> tuple[QuantizedTensor, Tensor | None]:
    """Of a layer, (out, in) and (out,), in a call with x to which `why_not` has nothing; nothing is copied but a bias.

    The bias comes in the dtype of the values, as bitsandbytes casts it.
    """
    dtype = product_dtype(x)
    weight = _of_8bit(module, dtype) if type(module).__name__ in _8BIT else _of_4bit(module, dtype)
    return weight, None if module.bias is None else module.bias.to(dtype)


def _unreadable_4bit(module: Any) -> str | None:
    state = _state(module)
    if state is None:
        return "a 4-bit weight that bitsandbytes has yet to quantise"
    if state.quant_type != "nf4":
        return f"a weight in {state.quant_type.upper()}"
    return None if _is_known(module, state) else "a 4-bit weight in another layout"


def _why_not_4bit(module: Any, x: Tensor | None) -> str | None:
    unreadable = _unreadable_4bit(module)
    if unreadable is not None:
        return unreadable
    state = _state(module)
    given = state.dtype if x is None else product_dtype(x)
    if given != values_dtype(module):
        return f"a compute_dtype of {values_dtype(module)} for an input of {given}"
    return None


def _of_4bit(module: Any, dtype: torch.dtype) -> NF4Tensor:
    state = _state(module)
    encoding = NF4Encoding(tuple(state.shape), dtype, state.blocksize, state.nested)
    nested = (state.state2.absmax, state.state2.code, state.offset) if state.nested else ()
    # The packed codes may be stored as elements of another dtype. Detached, they count the changes of the weight.
    return NF4Tensor(encoding, (module.weight.detach().view(-1).view(torch.uint8), state.absmax, *nested))


def _state(module: Any) -> Any:
    """bitsandbytes' QuantState; the layer has it too, since FSDP's flat parameters drop that of the weight."""
    state = getattr(module.weight, "quant_state", None)
    return module.quant_state if state is None else state


def _is_known(module: Any, state: Any) -> bool:
    """Whether it is the layout of `NF4Encoding`: not that into which bitsandbytes packs weights to infer on CPUs."""
    shape = (module.out_features, module.in_features)
    size, stored = math.prod(shape), module.weight
    if type(stored).__name__ != "Params4bit" or tuple(state.shape) != shape or state.blocksize not in BLOCK_SIZES:
        return False
    nested = not state.nested or (state.state2.blocksize == NESTED_BLOCK and state.state2.absmax.dtype == torch.float32)
    return (
        nested
        and not getattr(state, "packing_format_for_cpu", False)
        and stored.is_contiguous()
        and stored.numel() * stored.itemsize == (size + 1) // 2
        and state.absmax.dtype == (torch.uint8 if state.nested else torch.float32)
        and state.absmax.numel() == -(-size // state.blocksize)
    )


def _unreadable_8bit(module: Any) -> str | None:
    stored, scales = module.weight, _scales(module)
    shape = (module.out_features, module.in_features)
    if module.state.has_fp16_weights or stored.dtype != torch.int8 or scales is None:
        return "an 8-bit weight that bitsandbytes has yet to quantise"
    known = type(stored).__name__ == "Int8Params" and tuple(stored.shape) == shape and stored.is_contiguous()
    if not known or scales.dtype != torch.float32 or tuple(scales.shape) != shape[:1]:
        return "an 8-bit weight in another layout"
    return None


def _why_not_8bit(module: Any) -> str | None:
    """In evaluation bitsandbytes rounds the input to 8 bits too."""
    return _unreadable_8bit(module) or (None if module.training else "an 8-bit weight in evaluation")


def _of_8bit(module: Any, dtype: torch.dtype) -> Int8Tensor:
    scales = _scales(module)
    assert scales is not None
    return Int8Tensor(Int8Encoding((module.out_features, module.in_features), dtype), (module.weight.detach(), scales))


def _scales(module: Any) -> Tensor | None:
    """The rows' absolute maxima, which bitsandbytes moves from the weight to the layer in its first call."""
    scales = getattr(module.weight, "SCB", None)
    return module.state.SCB if scales is None else scales
