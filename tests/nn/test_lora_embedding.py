"""nn.LoRAEmbedding: PEFT's keys and results, merging, and heads that are tied to it."""

import copy

import peft
import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from memkernels import nn
from memkernels.ops.lora_linear import norm
from memkernels.testing import assert_within_factor_two

OPTIONS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
on_every_kind = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
KINDS = {
    "plain": torch.nn.Embedding,
    "padded": lambda *sizes: torch.nn.Embedding(*sizes, padding_idx=5),
    "scaled": lambda *sizes: Gemma3TextScaledWordEmbedding(*sizes, padding_idx=0, embed_scale=20**0.5),
}
IDS = torch.randint(0, 30, (5, 17), generator=torch.Generator().manual_seed(2))


def make(options, kind="plain", dtype=torch.float32):
    torch.manual_seed(0)
    layer = nn.LoRAEmbedding(KINDS[kind](30, 20).to(dtype), 3, alpha=5.0, **options)
    torch.manual_seed(1)
    for parameter in layer.adapter.values():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return layer


def peft_layer(layer, options):
    """PEFT's layer with the same state_dict."""
    model = torch.nn.Sequential(copy.deepcopy(layer.base_layer))
    config = peft.LoraConfig(r=3, lora_alpha=5.0, lora_dropout=0.5, target_modules=["0"], **options)
    other = peft.get_peft_model(model, config, autocast_adapter_dtype=False).base_model.model[0]
    other.to(layer.factors[0].dtype)  # and the base, whose dtype the adapter's was made in
    other.load_state_dict(layer.state_dict())
    other.base_layer.to(layer.weight.dtype)
    return other.train()


def run(layer):
    wanted = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    y = layer(IDS)
    grads = torch.autograd.grad(y, list(wanted.values()), torch.cos(torch.arange(y.numel()).to(y)).view(y.shape))
    return dict(zip(("y", *wanted), (y, *grads), strict=True))


@on_every_kind
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_pefts_layer(options, kind, dtype):
    layer = make(options, kind, dtype)
    ours, plain = run(layer), run(peft_layer(layer, options))
    exact = run(peft_layer(copy.deepcopy(layer).double(), options))
    assert ours.keys() == plain.keys() == exact.keys()
    for name, value in ours.items():
        assert_within_factor_two(name, value, exact[name], plain[name])


@on_every_kind
@pytest.mark.parametrize("kind", KINDS)
def test_begins_as_the_base_layer(options, kind):
    base = KINDS[kind](30, 20).bfloat16()
    layer = nn.LoRAEmbedding(base, 3, **options)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in layer.adapter.values())
    assert not base.weight.requires_grad
    torch.testing.assert_close(layer(IDS), base(IDS), rtol=2**-7, atol=0)  # DoRA's norm over itself is one, rounded


@on_every_kind
@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_unmerge(options, kind, monkeypatch):
    monkeypatch.setattr(norm, "_TILE_ELEMENTS", 7 * 20)  # tiles that do not divide the rows
    layer = make(options, kind, torch.float64)
    expected, before = layer(IDS), layer.weight.clone()
    layer.merge()
    assert layer.merged and not torch.equal(layer.weight, before)
    torch.testing.assert_close(layer(IDS), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="LoRAEmbedding: it is merged already"):
        layer.merge()
    layer.unmerge()
    torch.testing.assert_close(layer.weight, before, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="LoRAEmbedding: it is not merged"):
        layer.unmerge()


def make_tied():
    torch.manual_seed(0)
    embedding, head = torch.nn.Embedding(30, 20).double(), torch.nn.Linear(20, 30).double()
    head.weight = embedding.weight
    adapted = nn.LoRAEmbedding(embedding, 3, alpha=5.0)
    for factor in adapted.factors:
        torch.nn.init.normal_(factor, std=0.3)
    return torch.nn.Sequential(adapted, nn.LoRALinear(head, 3, alpha=5.0, tied_to=adapted))


def test_a_tied_head_has_the_embeddings_adapter():
    model = make_tied()
    embedding, head = model
    assert not head.adapter and not any("lora_" in name for name in head.state_dict())
    a, b = (of.detach().clone().requires_grad_() for of in embedding.factors)
    weight = embedding.base_layer.weight + embedding.scaling * (b @ a).t()
    expected = torch.nn.functional.linear(weight[IDS], weight, head.bias)
    torch.testing.assert_close(model(IDS), expected)
    wanted = torch.autograd.grad(expected.square().sum(), (a, b))
    for ours, of in zip(torch.autograd.grad(model(IDS).square().sum(), embedding.factors), wanted, strict=True):
        torch.testing.assert_close(ours, of)
    again = copy.deepcopy(model)
    assert again[1].tied_to is again[0]
    for merged, other in ((0, 1), (1, 0)):
        model[merged].merge()
        assert model[other].merged
        torch.testing.assert_close(model(IDS), expected)
        with pytest.raises(ValueError, match="it is merged already"):
            model[other].merge()
        model[other].unmerge()
        assert not model[merged].merged
        torch.testing.assert_close(model(IDS), expected)
    head.alpha = 6.0
    with pytest.raises(ValueError, match=r"scaling: expected that of the tied embedding to merge, 1\.6"):
        head.merge()


class Embedding(torch.nn.Embedding):
    """As that of another library."""


def test_bad_input():
    for option, value in (("max_norm", 1.0), ("scale_grad_by_freq", True), ("sparse", True)):
        with pytest.raises(ValueError, match=f"base_layer: {option}: expected none under an adapter, got {value}"):
            nn.LoRAEmbedding(torch.nn.Embedding(3, 4, **{option: value}))
    for other in (torch.nn.Linear(3, 4), Embedding(3, 4)):
        with pytest.raises(TypeError, match=r"base_layer: expected a torch\.nn\.Embedding, got"):
            nn.LoRAEmbedding(other)
    with pytest.raises(TypeError, match=r"base_layer\.weight: expected float32"):
        nn.LoRAEmbedding(torch.nn.Embedding(3, 4).to(torch.float8_e4m3fn))
    with pytest.raises(ValueError, match="r: expected a positive number"):
        nn.LoRAEmbedding(torch.nn.Embedding(3, 4), 0)
    base, head = torch.nn.Embedding(3, 4), torch.nn.Linear(4, 3)
    adapted = nn.LoRAEmbedding(base, 2)
    with pytest.raises(ValueError, match="tied_to: expected an embedding of the base layer's weight"):
        nn.LoRALinear(head, 2, tied_to=adapted)
    with pytest.raises(TypeError, match=r"tied_to: expected an nn\.LoRAEmbedding, got Embedding"):
        nn.LoRALinear(head, 2, tied_to=base)
    head.weight = base.weight
    with pytest.raises(ValueError, match="r: expected 2, that of tied_to, got 3"):
        nn.LoRALinear(head, 3, tied_to=adapted)
    with pytest.raises(ValueError, match="use_dora: expected none beside tied_to"):
        nn.LoRALinear(head, 2, use_dora=True, tied_to=adapted)
