"""Layers name a size that is no positive integer."""

import pytest

from memkernels import nn

CASES = [
    (nn.RMSNorm, ("hidden_size",)),
    (nn.LayerNorm, ("hidden_size",)),
    (nn.GatedMLP, ("hidden_size", "intermediate_size")),
    (nn.LinearCrossEntropy, ("hidden_size", "vocab_size")),
]
SIZES = [(layer, sizes, name) for layer, sizes in CASES for name in sizes]
IDS = [f"{layer.__name__}-{name}" for layer, _, name in SIZES]


@pytest.mark.parametrize(("layer", "sizes", "name"), SIZES, ids=IDS)
@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-3, ValueError), (2.5, TypeError), ("8", TypeError)])
def test_sizes_are_positive_integers(layer, sizes, name, value, error):
    with pytest.raises(error, match=f"^{name}: expected a positive integer, got "):
        layer(**(dict.fromkeys(sizes, 8) | {name: value}))
