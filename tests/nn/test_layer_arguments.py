"""Layers name a size that is no positive integer, a flag that is no bool, and a dtype that is not floating."""

from functools import partial

import pytest
import torch

from memkernels import nn

CASES = [
    (nn.RMSNorm, ("hidden_size",)),
    (nn.LayerNorm, ("hidden_size",)),
    (nn.GatedMLP, ("hidden_size", "intermediate_size")),
    (nn.LinearCrossEntropy, ("hidden_size", "vocab_size")),
    (nn.Attention, ("hidden_size", "num_heads")),
]
SIZES = [(layer, sizes, name) for layer, sizes in CASES for name in sizes]
IDS = [f"{layer.__name__}-{name}" for layer, _, name in SIZES]


@pytest.mark.parametrize(("layer", "sizes", "name"), SIZES, ids=IDS)
@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-3, ValueError), (2.5, TypeError), ("8", TypeError)])
def test_sizes_are_positive_integers(layer, sizes, name, value, error):
    with pytest.raises(error, match=f"^{name}: expected a positive integer, got "):
        layer(**(dict.fromkeys(sizes, 8) | {name: value}))


@pytest.mark.parametrize(
    ("layer", "sizes", "flag"),
    [
        (nn.LayerNorm, (8,), "bias"),
        (nn.GatedMLP, (8, 8), "bias"),
        (nn.GatedMLP, (8, 8), "gated"),
        (nn.LinearCrossEntropy, (8, 8), "bias"),
        *((nn.Attention, (8, 2), flag) for flag in ("bias", "out_bias", "head_norm", "sinks", "causal", "interleaved")),
    ],
)
@pytest.mark.parametrize("value", [2, None, "no", torch.tensor([True, False])])
def test_flags_are_bools(layer, sizes, flag, value):
    with pytest.raises(TypeError, match=f"^{flag}: expected True or False, got "):
        layer(*sizes, **{flag: value})


@pytest.mark.parametrize(("layer", "sizes"), CASES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, "bfloat16"])
def test_dtypes_are_floating(layer, sizes, dtype):
    with pytest.raises(TypeError, match=f"^dtype: expected float32, bfloat16, float16 or float64, got {dtype}"):
        layer(**dict.fromkeys(sizes, 8), dtype=dtype)


def test_norms_made_on_the_meta_device_start_as_others():
    for make in (partial(nn.RMSNorm, weight_offset=1.0), nn.RMSNorm, nn.LayerNorm):
        norm = make(8, device="meta").to_empty(device="cpu")
        norm.reset_parameters()
        assert all(torch.equal(a, b) for a, b in zip(norm.parameters(), make(8).parameters(), strict=True))
        assert torch.equal(norm.weight, torch.full((8,), 1.0 - getattr(norm, "weight_offset", 0.0)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"attention": torch.nn.MultiheadAttention(8, 2)},
            TypeError,
            r"attention: expected an nn\.Attention, got Multi",
        ),
        ({"mlp": nn.Attention}, TypeError, r"mlp: expected an nn\.GatedMLP, got type"),
        ({"norm_eps": "1e-6"}, TypeError, "norm_eps: expected a finite number from 0 up, got '1e-6'"),
        ({"norm_eps": -1.0}, ValueError, "norm_eps: expected a finite number from 0 up, got -1.0"),
        ({"norm_eps": float("nan")}, ValueError, "norm_eps: expected a finite number from 0 up, got nan"),
    ],
)
def test_a_decoder_layer_names_what_it_cannot_be_made_of(change, error, message):
    with pytest.raises(error, match=f"^{message}"):
        nn.DecoderLayer(**{"attention": nn.Attention(8, 2), "mlp": nn.GatedMLP(8, 16)} | change)
