"""Ops compiled whole where nothing needs a gradient: torch.compile then traces their Function's forward itself.

It leaves `ctx` out where forward has as many parameters, `ctx` and a `*name` among them, as it is given arguments.
"""

import pytest
import torch
from experts import random_ids

from memkernels import ops, quant

D, N, E = 64, 32, 4
IDS = random_ids(9, 2, E)


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0]))


def grouped_matmul(x, weights):
    x_grouped, plan = ops.moe_dispatch(x, IDS, E)
    return ops.grouped_matmul(x_grouped, weights, plan)


CASES = {
    "moe_mlp": (lambda x, *weights: ops.moe_mlp(x, IDS, torch.ones(9, 2), *weights), draw(E, 2 * N, D), draw(E, D, N)),
    "grouped_matmul": (grouped_matmul, draw(E, N, D)),
    "grouped_matmul of int8": (grouped_matmul, quant.quantize_int8(draw(E, N, D))),
    "linear of int8": (torch.nn.functional.linear, quant.quantize_int8(draw(N, D))),
    "gated_mlp": (ops.gated_mlp, draw(N, D), draw(N, D), draw(D, N)),
    "gated_mlp without a gate": (lambda x, *weights: ops.gated_mlp(x, None, *weights), draw(N, D), draw(D, N)),
    "lora_linear": (ops.lora_linear, draw(N, D), draw(2, D), draw(N, 2)),
    "linear_cross_entropy": (lambda x, w: ops.linear_cross_entropy(x, w, torch.arange(9)), draw(N, D)),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_eager(case):
    function, *weights = CASES[case]
    x = draw(9, D)
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, *weights), function(x, *weights))
