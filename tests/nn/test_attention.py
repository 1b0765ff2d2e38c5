"""nn.Attention and nn.DecoderLayer against the layers of transformers that they stand in for."""

import pytest
import torch

from memkernels import nn, ops

transformers = pytest.importorskip("transformers")
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12,
    "num_hidden_layers": 1, "vocab_size": 16, "attn_implementation": "eager",
}  # fmt: skip


def theirs(family):
    config = getattr(transformers, f"{family}Config")(**SIZES)
    model = getattr(transformers, f"{family}Model")(config).eval()
    return model, model.layers[0]


def run_theirs(model, layer, x):
    tables = model.rotary_emb(x, torch.arange(x.shape[1])[None])
    hidden = torch.full((x.shape[1], x.shape[1]), float("-inf"), dtype=x.dtype).triu(1)[None, None]
    return layer(x, position_embeddings=tables, attention_mask=hidden), tables


@pytest.mark.parametrize(
    ("family", "options"), [("Llama", {}), ("Qwen2", {"bias": True}), ("Qwen3", {"head_norm": True})]
)
def test_decoder_layer_takes_their_weights_and_gives_their_results(family, options):
    torch.manual_seed(0)
    model, layer = theirs(family)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    ours = nn.DecoderLayer(nn.Attention(32, 4, 2, head_size=12, **options), nn.GatedMLP(32, 48))
    assert set(ours.state_dict()) == set(layer.state_dict())
    ours.load_state_dict(layer.state_dict())
    x = torch.randn(2, 7, 32, requires_grad=True)
    expected, (cos, sin) = run_theirs(model, layer, x)
    actual = ours(x, cos, sin)
    torch.testing.assert_close(actual, expected)
    of_theirs = torch.autograd.grad(expected.square().sum(), [x, *layer.parameters()])
    of_ours = torch.autograd.grad(actual.square().sum(), [x, *ours.parameters()])
    names = ["x", *(name for name, _ in layer.named_parameters())]
    expected_gradients = dict(zip(names, of_theirs, strict=True))
    for name, gradient in zip(["x", *(name for name, _ in ours.named_parameters())], of_ours, strict=True):
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-4)


def test_dropout_is_for_training_and_sinks_learn():
    torch.manual_seed(0)
    layer = nn.Attention(32, 4, sinks=True, dropout_p=0.5, causal=False, window=(2, 2))
    x = torch.randn(1, 9, 32)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer(x).sum().backward()
    assert layer.sinks.grad.abs().sum() > 0
    direct = ops.attention_block(x, **layer.arguments())
    assert torch.equal(layer(x), direct)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_sinks_are_cast_with_the_layer_and_learn(dtype):
    torch.manual_seed(0)
    layer, x = nn.Attention(32, 4, sinks=True), torch.randn(2, 9, 32)
    torch.nn.init.normal_(layer.sinks)
    layer.sinks.data = layer.sinks.to(dtype).float()
    expected = layer(x)
    expected.sum().backward()
    wanted, layer = layer.sinks.grad.clone(), layer.to(dtype)
    layer.zero_grad()
    actual = layer(x.to(dtype))
    actual.sum().backward()
    assert layer.sinks.dtype == layer.sinks.grad.dtype == actual.dtype == dtype
    torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.01)
    torch.testing.assert_close(layer.sinks.grad.float(), wanted, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_heads": 0}, ValueError, "num_heads: expected a positive integer, got 0"),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads: expected a positive integer, got 0"),
        ({"num_kv_heads": -2}, ValueError, "num_kv_heads: expected a positive integer, got -2"),
        ({"head_size": 4.0}, TypeError, "head_size: expected a positive integer, got 4.0"),
        ({"dropout_p": 2.0}, ValueError, r"dropout_p: expected a number in \[0, 1\), got 2.0"),
        ({"window": 5}, ValueError, "window: expected two numbers of keys, -1 for unbounded, got 5"),
        ({"softcap": -1.0}, ValueError, "softcap: expected"),
        ({"causal": None}, TypeError, "causal: expected True or False, got None"),
        ({"interleaved": 1}, TypeError, "interleaved: expected True or False, got 1"),
    ],
)
def test_bad_options_are_refused_when_the_layer_is_made(options, error, message):
    with pytest.raises(error, match=message):
        nn.Attention(32, **{"num_heads": 4} | options)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="num_kv_heads: expected a divisor of num_heads 4, got 3"):
        nn.Attention(32, 4, 3)
    with pytest.raises(ValueError, match="num_heads: expected a divisor of hidden_size 32, got 5"):
        nn.Attention(32, 5)
