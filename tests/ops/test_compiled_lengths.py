"""torch.compile of calls whose number of tokens changes: one graph of the first, and one more for all others."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from memkernels import ops
from memkernels.testing import random_tensor

D = 16
CALLS = {
    "attention": (lambda x, w: ops.attention(*[(x * w[0]).view(2, -1, 2, D // 2)] * 3, causal=True)),
    "attention_block": (lambda x, w: ops.attention_block(x, w, w, w, w, num_heads=2, causal=True)),
    "gated_mlp": (lambda x, w: ops.gated_mlp(x, w, w, w)),
    "rms_norm": (lambda x, w: ops.rms_norm(x, w[0])),
    "layer_norm": (lambda x, w: ops.layer_norm(x, w[0])),
}


@pytest.mark.parametrize("name", CALLS)
def test_other_lengths_share_a_graph(name):
    def step(x, weight):
        return CALLS[name](x, weight).square().sum()

    torch.compiler.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=graphs)
    weight = random_tensor(D, D, dtype=torch.float32, scale=D**-0.5)
    for length in (37, 29, 21, 33):
        x = random_tensor(2, length, D, dtype=torch.float32, seed=1)
        expected, actual = (torch.autograd.grad(run(x, weight), (x, weight)) for run in (step, compiled))
        torch.testing.assert_close(actual, expected)
    assert graphs.frame_count == 2
