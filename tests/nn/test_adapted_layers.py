"""memkernels.lora over this package's own layers: their adapters compute, and learn, as layers called one by one."""

import copy

import pytest
import torch
import torch.nn.functional as F

import memkernels
from memkernels import nn, ops
from memkernels.ops.quantized.tensor import QuantizedTensor
from memkernels.testing import assert_within_factor_two, random_tensor

D, HEADS, KV_HEADS, SIZE = 20, 4, 2, 8


def attention():
    return nn.Attention(D, HEADS, KV_HEADS, head_size=SIZE, bias=True, out_bias=True)


LAYERS = {
    "Attention": attention,
    "GatedMLP": lambda: nn.GatedMLP(D, 36, bias=True),
    "ungated": lambda: nn.GatedMLP(D, 36, "gelu", gated=False),
    "DecoderLayer": lambda: nn.DecoderLayer(attention(), nn.GatedMLP(D, 36)),
    "MoE": lambda: nn.MoE(nn.TopKRouter(D, 4, 2), D, 12, shared=nn.GatedMLP(D, 36)),
}


def one_by_one(layer, x):
    """The same of plain functions and calls of the linear layers, in the order in which the ops draw seeds."""
    if isinstance(layer, nn.Attention):
        q, k, v = (
            getattr(layer, f"{name}_proj")(x).unflatten(-1, (heads, SIZE))
            for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
        )
        return layer.o_proj(ops.attention(q, k, v, causal=True, backend="reference").flatten(-2))
    if isinstance(layer, nn.GatedMLP):
        act = {"silu": F.silu, "gelu": F.gelu}[layer.activation]
        hidden = layer.up_proj(x) if layer.gate_proj is None else None
        hidden = act(hidden) if hidden is not None else act(layer.gate_proj(x)) * layer.up_proj(x)
        return layer.down_proj(hidden)
    if isinstance(layer, nn.MoE):
        shared, layer.shared = layer.shared, None
        try:
            return layer(x)[0] + one_by_one(shared, x)
        finally:
            layer.shared = shared
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    for norm, part in zip(norms, (layer.self_attn, layer.mlp), strict=True):
        x = x + one_by_one(part, F.rms_norm(x, (D,), norm.weight, norm.eps))
    return x


def fused(layer, x):
    return layer(x)[0] if isinstance(layer, nn.MoE) else layer(x)


def in_float64(layer):
    exact = copy.deepcopy(layer)
    for module in exact.modules():
        weight = getattr(module, "weight", None)
        if type(module) is torch.nn.Linear and isinstance(weight, QuantizedTensor):
            module.weight = torch.nn.Parameter(weight.dequantize(), requires_grad=False)
    return exact.double()


def run(function, layer, dtype=torch.float32):
    """The result and the gradients of x and of the adapters, of five draws each; None without a gradient."""
    draws = [run_once(function, layer, dtype, seed) for seed in range(5)]
    return {name: None if draws[0][name] is None else torch.stack([of[name] for of in draws]) for name in draws[0]}


def run_once(function, layer, dtype, seed):
    x = random_tensor(2, 11, D, dtype=dtype, seed=10 + seed)
    torch.manual_seed(seed)
    y = function(layer, x)
    wanted = {"x": x} | {name: p for name, p in layer.named_parameters() if p.requires_grad}
    cotangent = random_tensor(*y.shape, dtype=torch.float32, seed=1).detach().to(dtype)
    gradients = torch.autograd.grad(y, wanted.values(), cotangent, allow_unused=True)
    return {"y": y} | dict(zip(wanted, gradients, strict=True))


@pytest.mark.parametrize("merged", [False, True], ids=["", "merged"])
@pytest.mark.parametrize("base", [None, "nf4"])
@pytest.mark.parametrize("kind", LAYERS)
def test_adapters_compute_and_learn(kind, base, merged):
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    model = torch.nn.ModuleDict({"layer": layer})
    memkernels.lora(model, 3, 5.0, dropout=0.3, base=base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    if merged:
        memkernels.merge_adapter(model)
    actual, plain, exact = run(fused, layer), run(one_by_one, layer), run(one_by_one, in_float64(layer), torch.float64)
    assert len(actual) == 2 + 2 * sum(isinstance(module, nn.LoRALinear) for module in layer.modules())
    for name, value in actual.items():
        if merged and "lora_" in name:
            assert value is None, name
        else:
            assert exact[name].norm() > 0
            assert_within_factor_two(name, value, exact[name], plain[name], roundings=2, draws=True)


def test_a_projection_of_another_kind_is_refused_and_not_dropped():
    layer = nn.GatedMLP(D, 36)
    layer.up_proj = torch.nn.Sequential(layer.up_proj)
    with pytest.raises(TypeError, match=r"up_proj: expected a torch\.nn\.Linear or an nn\.LoRALinear, got torch"):
        layer(torch.zeros(3, D))
