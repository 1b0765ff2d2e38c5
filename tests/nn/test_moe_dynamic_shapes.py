"""Layers of experts under torch.compile with calls of different numbers of tokens."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from memkernels import nn

D, E, N = 8, 6, 7
LAYERS = {
    "top k": lambda: nn.MoE(nn.TopKRouter(D, E, 2), D, N),
    "switch": lambda: nn.SwitchFFN(D, N, E, jitter=0.0),
    "expert choice": lambda: nn.MoE(nn.ExpertChoiceRouter(D, E), D, N),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_second_number_of_tokens_compiles_for_all(kind):
    torch.compiler.reset()
    layer, compilations = LAYERS[kind](), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=compilations, fullgraph=True)
    for tokens in (24, 31, 57, 64):
        x = torch.randn(tokens, D, generator=torch.Generator().manual_seed(tokens)).requires_grad_()
        results = []
        for call in (layer, compiled):
            y, routing = call(x)
            loss = y.square().sum() + routing.load_balance_loss + routing.z_loss
            results.append([y, *torch.autograd.grad(loss, (x, *layer.parameters()))])
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager)
    assert compilations.frame_count == 2
