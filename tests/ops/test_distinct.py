"""One tensor given twice: every op is traced whole, and adds up its gradients, as in eager mode."""

import pytest
import torch

from memkernels import ops

X, W, V = (8, 16), (16, 16), (16,)
TWICE = {  # an op of tensors of these shapes
    "attention": (lambda q: ops.attention(q, q, q), (1, 8, 2, 16)),
    "attention_block": (lambda x, w: ops.attention_block(x[None], w, w, w, w, num_heads=2), X, W),
    "gated_mlp": (lambda x, w: ops.gated_mlp(x, w, w, w), X, W),
    "decoder_layer": (
        lambda x, w, n: ops.decoder_layer(
            x[None],
            {"w_q": w, "w_k": w, "w_v": w, "w_o": w, "num_heads": 2, "norm_weight": n},
            {"w_gate": w, "w_up": w, "w_down": w, "norm_weight": n},
        ),
        X, W, V,
    ),
    "rms_norm": (lambda x, n: sum(ops.rms_norm(x, n, residual=x)), X, V),
    "layer_norm": (lambda x, n: sum(ops.layer_norm(x, n, n, residual=x)), X, V),
    "apply_rotary": (lambda q: sum(ops.apply_rotary(q, q, torch.eye(8, 16), torch.eye(8, 16))), (1, 8, 2, 16)),
    "gated_activation": (lambda x: ops.gated_activation(x, x), X),
    "linear_cross_entropy": (lambda x: ops.linear_cross_entropy(x, x, torch.arange(8)), X),
    "lora_linear": (lambda x, w: ops.lora_linear(x, w, w, w, scaling=1.0), X, W),
}  # fmt: skip


@pytest.mark.parametrize("op", TWICE)
def test_compiles_whole_and_equals_eager(op):
    function, *shapes = TWICE[op]
    torch.manual_seed(0)
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    torch.compiler.reset()
    results = []
    for of in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        y = of(*inputs)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for eager, compiled in zip(*results, strict=True):
        # One tensor's gradients are added in another order, by autograd and not by the op.
        atol = 8 * torch.finfo(torch.float32).eps * eager.abs().max().item()
        torch.testing.assert_close(compiled, eager, rtol=0, atol=atol)
