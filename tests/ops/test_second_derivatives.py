"""Second derivatives: rotary has them; of every other op a second backward is a clear error, not a part left out."""

import pytest
import torch
import torch.utils.checkpoint

from memkernels import ops, quant
from memkernels.ops.rotary import reference as rotary_reference
from memkernels.ops.router_logits.op import router_logits
from memkernels.testing import random_tensor

D, HEADS = 16, 2


def norm(function):
    return lambda x, w: function(x, w[0])


def square(w):
    return w[:D]


IDS = torch.tensor([[0, 1], [1, 0], [1, 0], [0, 1]])


def plan(choices):
    return ops.moe_plan(IDS[:, :choices], 2)


def moe_mlp(x, w):
    w_gate_up, w_down = w[:8].view(2, 4, D), w[8:12].view(2, D, 2)
    return ops.moe_mlp(x, plan(2), torch.ones(4, 2), w_gate_up, w_down)


def decoder_layer(x, w):
    attention = dict.fromkeys(("w_q", "w_k", "w_v", "w_o"), square(w)) | {"norm_weight": w[0], "num_heads": HEADS}
    mlp = dict.fromkeys(("w_gate", "w_up", "w_down"), square(w)) | {"norm_weight": w[0]}
    return ops.decoder_layer(x[None], attention, mlp)


OPS = {
    "rms_norm": norm(ops.rms_norm),
    "rms_norm with a residual": lambda x, w: ops.rms_norm(x, w[0], residual=x * 2)[0],
    "layer_norm": norm(ops.layer_norm),
    "gated_activation": lambda x, w: ops.gated_activation(x, w[:4]),
    "gated_mlp": lambda x, w: ops.gated_mlp(x, square(w), square(w), square(w)),
    "attention": lambda x, w: ops.attention(*(x.view(1, 4, HEADS, -1) for _ in range(3))),
    "attention_block": lambda x, w: ops.attention_block(x[None], *[square(w)] * 4, num_heads=HEADS),
    "lora_linear": lambda x, w: ops.lora_linear(x, square(w), w[:2], w[:D, :2]),
    "quantized_linear": lambda x, w: torch.nn.functional.linear(x, quant.quantize_int8(w.detach())),
    "linear_cross_entropy": lambda x, w: ops.linear_cross_entropy(x, w, torch.tensor([1, 2, 3, 4])),
    "linear_cross_entropy of each token": lambda x, w: ops.linear_cross_entropy(
        x, w, torch.tensor([1, 2, 3, 4]), reduction="none"
    ),
    "decoder_layer": decoder_layer,
    "moe_mlp": moe_mlp,
    "moe_dispatch": lambda x, w: ops.moe_dispatch(x, IDS, 2)[0],
    "moe_combine": lambda x, w: ops.moe_combine(x, plan(1), w[:4, :1]),
    "router_logits": lambda x, w: router_logits(x, w[:3]),
    "grouped_matmul": lambda x, w: ops.grouped_matmul(x, w[:8].view(2, 4, D), plan(1)),
}


# What is linear in x and saves nothing that has a gradient: its gradient depends on the incoming one alone.
LINEAR = ("quantized_linear", "moe_dispatch")


def first_gradient(name, incoming_has_graph):
    """dx, x and the incoming gradient."""
    x, w = random_tensor(4, D, dtype=torch.float32), random_tensor(20, D, dtype=torch.float32, seed=1, scale=0.3)
    y = OPS[name](x, w)
    dy = torch.ones_like(y).requires_grad_(incoming_has_graph)
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    (plain,) = torch.autograd.grad(OPS[name](x, w), x, dy)
    assert torch.equal(dx, plain)
    return dx, x, dy


@pytest.mark.parametrize("name", [name for name in OPS if name not in LINEAR])
def test_a_second_backward_is_an_error(name):
    """x.sum() has a gradient, which alone would be taken for the whole."""
    for inputs in (True, False):
        dx, x, _ = first_gradient(name, False)
        loss = dx.square().sum() + x.sum()
        with pytest.raises(RuntimeError, match="its gradients have no derivative of their own"):
            torch.autograd.grad(loss, x) if inputs else loss.backward()


@pytest.mark.parametrize("name", OPS)
def test_a_second_backward_for_the_incoming_gradient_is_an_error(name):
    dx, _, dy = first_gradient(name, True)
    with pytest.raises(RuntimeError, match="its gradients have no derivative of their own"):
        torch.autograd.grad(dx.square().sum() + dy.sum(), dy)


@pytest.mark.parametrize("name", LINEAR)
def test_a_gradient_that_depends_on_nothing_is_a_constant(name):
    dx, x, _ = first_gradient(name, False)
    (second,) = torch.autograd.grad(dx.square().sum() + x.sum(), x)
    assert torch.equal(second, torch.ones_like(x))


@pytest.mark.parametrize("name", ["moe_mlp", "moe_combine"])
def test_a_second_backward_for_routing_weights_is_an_error(name):
    x, weights = random_tensor(4, D, dtype=torch.float32), random_tensor(4, 2, dtype=torch.float32, seed=2)
    if name == "moe_combine":
        y = ops.moe_combine(x.repeat(2, 1), plan(2), weights)
    else:
        w = random_tensor(12, D, dtype=torch.float32, seed=1, scale=0.3).detach()
        y = ops.moe_mlp(x, plan(2), weights, w[:8].view(2, 4, D), w[8:].view(2, D, 2))
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="its gradients have no derivative of their own"):
        torch.autograd.grad(dx.square().sum() + weights.sum(), weights)


def test_the_error_names_the_op_under_checkpointing_too():
    """Which allows saved tensors to be read once."""
    x, w = random_tensor(4, D, dtype=torch.float32), random_tensor(20, D, dtype=torch.float32, seed=1)
    y = torch.utils.checkpoint.checkpoint(OPS["rms_norm"], x, w, use_reentrant=False)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="RMSNorm: its gradients"):
        dx.sum().backward()


def test_rotary_has_second_derivatives():
    angles = random_tensor(4, 8, dtype=torch.float32, seed=2).detach()
    q, k = (random_tensor(1, 4, HEADS, 8, dtype=torch.float32, seed=seed) for seed in (3, 4))
    found = []
    for rotate in (ops.apply_rotary, rotary_reference.apply_rotary):
        outputs = rotate(q, k, angles.cos(), angles.sin())
        weights = [random_tensor(*output.shape, dtype=torch.float32, seed=5) for output in outputs]
        first = torch.autograd.grad(outputs, (q, k), weights, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(of.pow(3).sum() for of in first), weights)])
    torch.testing.assert_close(*found)
