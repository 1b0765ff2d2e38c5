"""nn.LoRALinear: PEFT's keys and results, merging, and the norms that it keeps."""

import copy
import gc
import io
import weakref

import numpy
import peft
import pytest
import torch
from compilers import on_every_compiler
from transformers.pytorch_utils import Conv1D

from memkernels import nn
from memkernels.nn.row_squares import kept_row_squares
from memkernels.ops.lora_linear import norm
from memkernels.quant import quantize_nf4
from memkernels.testing import assert_within_factor_two

OPTIONS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
on_every_kind = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def make_base(kind=torch.nn.Linear, dtype=torch.float32):
    torch.manual_seed(0)
    base = kind(20, 30) if kind is torch.nn.Linear else kind(30, 20)
    torch.nn.init.normal_(base.bias)
    return base.to(dtype)


def make(options, kind=torch.nn.Linear, dtype=torch.float32, **others):
    layer = nn.LoRALinear(make_base(kind, dtype), 3, alpha=5.0, **options, **others)
    torch.manual_seed(1)
    for parameter in layer.adapter.values():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return layer


def peft_layer(layer, options):
    """PEFT's layer with the same state_dict."""
    model = torch.nn.Sequential(copy.deepcopy(layer.base_layer))
    config = peft.LoraConfig(
        r=3, lora_alpha=5.0, target_modules=["0"], fan_in_fan_out=type(model[0]) is Conv1D, **options
    )
    other = peft.get_peft_model(model, config, autocast_adapter_dtype=False).base_model.model[0]
    other.load_state_dict(layer.state_dict())
    return other.to(layer.adapter["lora_A"].dtype)


def run(layer, dtype):
    x = torch.randn(5, 7, 20, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    wanted = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    y = layer(x)
    grads = torch.autograd.grad(y, [x, *wanted.values()], torch.cos(torch.arange(y.numel()).to(dtype)).view(y.shape))
    return dict(zip(("y", "x", *wanted), (y, *grads), strict=True))


@on_every_kind
@pytest.mark.parametrize("kind", [torch.nn.Linear, Conv1D])
def test_is_pefts_layer(options, kind):
    layer = make(options, kind)
    other = peft_layer(layer, options)
    ours, plain = run(layer, torch.float32), run(other, torch.float32)
    exact = run(peft_layer(make(options, kind).double(), options), torch.float64)
    assert ours.keys() == plain.keys() == exact.keys()
    for name, value in ours.items():
        assert_within_factor_two(name, value, exact[name], plain[name])


@on_every_kind
@pytest.mark.parametrize("kind", [torch.nn.Linear, Conv1D])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_begins_as_the_base_layer(options, kind, dtype):
    base = make_base(kind, dtype)
    layer = nn.LoRALinear(base, 3, **options)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in layer.adapter.values())
    assert not base.weight.requires_grad and not base.bias.requires_grad
    x = torch.randn(7, 20).to(dtype)
    assert_within_factor_two("y", layer(x), copy.deepcopy(base).double()(x.double()), base(x))


@on_every_kind
@pytest.mark.parametrize("kind", [torch.nn.Linear, Conv1D])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_merge_and_unmerge(options, kind, dtype, monkeypatch):
    monkeypatch.setattr(norm, "_TILE_ELEMENTS", 7 * 20)  # tiles that do not divide the rows
    layer = make(options, kind, dtype).eval()
    x, before = torch.randn(7, 20).to(dtype), layer.weight.clone()
    expected = layer(x)
    layer.merge()
    assert layer.merged and not torch.equal(layer.weight, before)
    exact = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(layer(x), expected, **exact)
    with pytest.raises(ValueError, match="merged already"):
        layer.merge()
    layer.unmerge()
    torch.testing.assert_close(layer.weight, before, **exact)
    torch.testing.assert_close(layer(x), expected, **exact)
    with pytest.raises(ValueError, match="not merged"):
        layer.unmerge()


def test_every_tensor_of_a_merged_layer_moves():
    layer = make({"use_dora": True})
    layer.merge()
    copied = copy.deepcopy(layer).to("meta")
    held = [
        of for module in copied.modules() for of in (*vars(module).values(), *module.buffers(), *module.parameters())
    ]
    assert all(of.is_meta for of in held if isinstance(of, torch.Tensor))
    layer = layer.double()
    layer.unmerge()
    torch.testing.assert_close(layer.weight, make({"use_dora": True}).double().weight, rtol=1e-5, atol=1e-5)


def test_merges_no_adapter_that_is_not_finite():
    layer = make({"use_dora": True})
    before = layer.weight.clone()
    with torch.no_grad():
        layer.adapter["lora_B"][3, 1] = float("nan")
    with pytest.raises(ValueError, match="lora_B: expected finite"):
        layer.merge()
    assert torch.equal(layer.weight, before) and not layer.merged


def test_row_norms_follow_the_weight():
    layer, x = make({"use_dora": True}).eval(), torch.randn(7, 20)
    layer(x)
    squares = kept_row_squares(layer, layer.weight)
    layer(x)
    assert kept_row_squares(layer, layer.weight) is squares
    with torch.no_grad():
        layer.base_layer.weight.mul_(2)
    torch.testing.assert_close(layer(x), peft_layer(layer, {"use_dora": True})(x))
    layer.base_layer.weight.data = layer.base_layer.weight.data * 3
    torch.testing.assert_close(layer(x), peft_layer(layer, {"use_dora": True})(x))
    again = copy.deepcopy(layer)
    again.load_state_dict(make({"use_dora": True}).state_dict())
    torch.testing.assert_close(again(x), peft_layer(again, {"use_dora": True})(x))


def test_row_norms_follow_a_weight_in_the_memory_of_another():
    layer, x = make({"use_dora": True}).eval(), torch.randn(7, 20)
    memory = bytearray(4 * 30 * 20)
    for scale in (1.0, 2.0):
        numpy.frombuffer(memory, dtype=numpy.float32)[:] = scale * numpy.cos(numpy.arange(600))  # torch knows nothing
        weight = torch.frombuffer(memory, dtype=torch.float32).view(30, 20)
        layer.base_layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        torch.testing.assert_close(layer(x), peft_layer(layer, {"use_dora": True})(x))


@pytest.mark.parametrize("kind", [torch.nn.Linear, Conv1D])
def test_row_norms_in_inference_mode(kind):
    options, x = {"use_dora": True}, torch.randn(7, 20)
    layer = make(options, kind)
    with torch.inference_mode():
        layer(x)
    run(layer, torch.float32)  # norms of then are not in the way of training
    with torch.inference_mode():
        layer = make(options, kind)
        for scale in (1.0, 2.0):
            layer.base_layer.weight.mul_(scale)
            torch.testing.assert_close(layer(x), peft_layer(layer, options)(x))


def test_kept_row_norms_are_in_nobodys_way():
    layer, x = nn.LoRALinear(make_base(), 3, use_dora=True), torch.randn(7, 20)
    layer.base_layer.weight = torch.nn.Parameter(quantize_nf4(layer.base_layer.weight.detach()), requires_grad=False)
    expected = layer(x)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    for again in (copy.deepcopy(layer), torch.load(stream, weights_only=False)):
        assert torch.equal(again(x), expected)
    layer.to(torch.bfloat16)
    assert torch.equal(layer(x.bfloat16()), copy.deepcopy(layer)(x.bfloat16()))
    reference = weakref.ref(layer)
    del layer, again
    gc.collect()
    assert reference() is None


@on_every_kind
def test_dropout_is_drawn_in_training_alone(options):
    layer, x = make(options, dropout=0.5), torch.randn(7, 20)
    torch.manual_seed(3)
    first, other = layer(x), layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first) and not torch.equal(first, other)
    torch.testing.assert_close(layer.eval()(x), make(options)(x))


@on_every_kind
@on_every_compiler
def test_compiles_whole(options, backend):
    layer = make(options)
    eager = run(layer, torch.float32)
    compiled = run(torch.compile(layer, fullgraph=True, backend=backend), torch.float32)
    for ours, of in zip(compiled.values(), eager.values(), strict=True):
        torch.testing.assert_close(ours, of)


def test_bad_input():
    with pytest.raises(TypeError, match=r"base_layer: expected a torch\.nn\.Linear"):
        nn.LoRALinear(torch.nn.Embedding(3, 4))
    with pytest.raises(ValueError, match="r: expected a positive number"):
        nn.LoRALinear(make_base(), 0)
    with pytest.raises(ValueError, match="dropout: expected"):
        nn.LoRALinear(make_base(), 2, dropout=1.0)
    with pytest.raises(TypeError, match="alpha: expected a number, got '32'"):
        nn.LoRALinear(make_base(), 2, alpha="32")
