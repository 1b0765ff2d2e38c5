"""nn.GatedMLP: a drop-in for the feed-forward layers of transformers."""

import pytest
import torch

from memkernels import nn
from memkernels.testing import random_tensor


def test_has_the_state_dict_and_the_result_of_llama_mlp():
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install memkernels[hf]"
    )
    from transformers.models.llama.modeling_llama import LlamaMLP

    theirs = LlamaMLP(
        transformers.LlamaConfig(hidden_size=16, num_attention_heads=2, intermediate_size=40, mlp_bias=True)
    )
    ours = nn.GatedMLP(16, 40, bias=True)
    ours.load_state_dict(theirs.state_dict())
    x = random_tensor(2, 5, 16, dtype=torch.float32)
    expected, actual = theirs(x), ours(x)
    torch.testing.assert_close(actual, expected)
    expected.square().sum().backward()
    actual.square().sum().backward()
    for (name, parameter), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=name)


def test_ungated_with_a_norm():
    layer = nn.GatedMLP(16, 40, "relu_squared", gated=False, tile_tokens=4)
    assert list(layer.state_dict()) == ["up_proj.weight", "down_proj.weight"]
    x, norm_weight = (random_tensor(*shape, dtype=torch.float32) for shape in ((9, 16), (16,)))
    normed = torch.nn.functional.rms_norm(x, (16,), norm_weight, 1e-5)
    expected = layer.down_proj(torch.relu(layer.up_proj(normed)).square())
    torch.testing.assert_close(layer(x, norm_weight=norm_weight, norm_eps=1e-5), expected)


def test_bad_options_are_refused_when_the_layer_is_made():
    with pytest.raises(ValueError, match="activation: expected one of silu"):
        nn.GatedMLP(16, 40, "swish")
    with pytest.raises(ValueError, match="tile_tokens: expected a positive integer or None, got 0"):
        nn.GatedMLP(16, 40, tile_tokens=0)
