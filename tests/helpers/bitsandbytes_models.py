"""Models with their linear layers in bitsandbytes' 4 and 8 bits, as transformers loads them, and dense ones again."""

import copy

import pytest
import torch

from memkernels.integrations import bitsandbytes as integration

bitsandbytes = pytest.importorskip("bitsandbytes")

# Rows of 64 are whole blocks, which a projection of several in one needs; those of 104 are not. By other multiples of
# 16, as 48, bitsandbytes 0.50.2 dequantises wrong values on processors with AVX-512.
WIDTH = {"hidden_size": 64}


def in_4bit(model, *, nested=True, quant_type="nf4", compute_dtype=None):
    """The model with its linear layers but the head in 4 bits, as transformers' load_in_4bit has them."""
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and name != "lm_head":
            dtype = module.weight.dtype
            layer = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, module.bias is not None, compute_dtype=compute_dtype or dtype,
                compress_statistics=nested, quant_type=quant_type,
            )  # fmt: skip
            layer.load_state_dict(module.state_dict())
            model.set_submodule(name, layer.to(dtype).to("cpu").requires_grad_(False))
    model.is_loaded_in_4bit = True
    return model.train()


def in_8bit(model):
    """The model with its linear layers but the head in 8 bits, as transformers' load_in_8bit has them."""
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and name != "lm_head":
            layer = bitsandbytes.nn.Linear8bitLt(
                module.in_features, module.out_features, module.bias is not None, has_fp16_weights=False, threshold=6.0
            )
            layer.load_state_dict(module.state_dict())
            model.set_submodule(name, layer.to(module.weight.dtype).to("cpu").requires_grad_(False))
    model.is_loaded_in_8bit = True
    return model.train()


def dequantized(model):
    """The model over dense layers of the same values, for the exact step."""
    for name, module in list(model.named_modules()):
        if integration.is_layer(module):
            layer = torch.nn.Linear(module.in_features, module.out_features, module.bias is not None)
            if isinstance(module, bitsandbytes.nn.Linear8bitLt):
                layer.weight.data = module.weight.CB.double() * (module.weight.SCB.double()[:, None] / 127)
            else:
                state = copy.copy(module.weight.quant_state)
                state.dtype = torch.float32
                layer.weight.data = bitsandbytes.functional.dequantize_4bit(module.weight.data, state)
            layer.bias = module.bias
            model.set_submodule(name, layer.requires_grad_(False))
    return model
