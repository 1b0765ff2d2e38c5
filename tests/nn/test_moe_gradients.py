"""Routers, their losses and the layers over them, gradients included, against loops over tokens."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from compilers import on_every_compiler
from experts import loop_over_tokens
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memkernels import nn
from memkernels.testing import check_op, random_tensor, saved_bytes

T, D, E, N = 24, 8, 6, 7
ROUTERS = {
    "switch": lambda: nn.SwitchRouter(D, E, capacity_factor=0.8),
    "softmax": lambda: nn.TopKRouter(D, E, 2),
    "normalized": lambda: nn.TopKRouter(D, E, 2, normalize=True, scaling=2.5),
    "softmax of top k": lambda: nn.TopKRouter(D, E, 2, scores="softmax_of_top_k"),
    "sigmoid": lambda: nn.TopKRouter(D, E, 2, scores="sigmoid", normalize=True, num_groups=3, top_groups=2),
    "expert choice": lambda: nn.ExpertChoiceRouter(D, E, capacity_factor=2.0),
}
every_router = pytest.mark.parametrize("kind", ROUTERS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
PADDING = torch.arange(T) % 5 == 3


def weight_of_choice(router, logits, ids, place):
    """Of one token: the weight of the choice at a place of its ids."""
    if isinstance(router, (nn.SwitchRouter, nn.ExpertChoiceRouter)):
        return logits.softmax(0)[ids[place]]
    if router.scores == "softmax_of_top_k":
        return logits[ids].softmax(0)[place]
    scores = logits.sigmoid() if router.scores == "sigmoid" else logits.softmax(0)
    chosen = scores[ids[place]]
    return router.scaling * (chosen / scores[ids].sum() if router.normalize else chosen)


def by_token(routing):
    """expert_ids and expert_weights, (T, k); of experts that chose, (T, E), each in its own place, zero elsewhere."""
    ids, weights, token_offsets = routing.expert_ids, routing.expert_weights, routing.plan.token_offsets
    if token_offsets is None:
        return ids, weights
    token = torch.repeat_interleave(token_offsets.diff().long())
    place = token, ids[: len(token)]
    weights = weights.new_zeros(T, E).index_put(place, weights[: len(token)])
    return torch.full((T, E), E).index_put(place, place[1]), weights


def loop_over_routed(router, ids, padding, x, weight):
    """Weights of the choices (T, k) that were made, zero of padding; the balance loss; the z-loss."""
    x, weight = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in (x, weight))
    weights, z_losses, shares = [], [], []
    chosen = torch.zeros(E, dtype=x.dtype)
    for row, of_token, hidden in zip(x, ids, padding.tolist(), strict=True):
        if hidden:
            weights.append(x.new_zeros(ids.shape[1]))
            continue
        logits = torch.stack([torch.dot(row, of_expert) for of_expert in weight])
        chosen_weights = [
            weight_of_choice(router, logits, of_token, place) if expert < E else logits.new_zeros(())
            for place, expert in enumerate(of_token.tolist())
        ]
        weights.append(torch.stack(chosen_weights))
        z_losses.append(logits.logsumexp(0).square())
        sigmoid = getattr(router, "scores", None) == "sigmoid"
        shares.append(logits.sigmoid() / logits.sigmoid().sum() if sigmoid else logits.softmax(0))
        for expert in of_token.tolist():
            if expert < E:
                chosen[expert] += 1
    balance = E * torch.dot(chosen / len(shares), sum(shares) / len(shares))
    if isinstance(router, nn.ExpertChoiceRouter):
        balance = 0.0 * balance
    return torch.stack(weights), balance, sum(z_losses) / len(z_losses)


def router_inputs(dtype):
    return {"x": random_tensor(T, D, dtype=dtype), "weight": random_tensor(E, D, dtype=dtype, seed=5)}


@every_router
@dtypes
@pytest.mark.parametrize("padded", [False, True], ids=["all", "padded"])
def test_a_router_and_its_losses_are_the_loop_over_tokens(kind, dtype, padded):
    router, inputs = ROUTERS[kind](), router_inputs(dtype)
    padding = PADDING if padded else torch.zeros_like(PADDING)

    def route(x, weight):
        return functional_call(router, {"weight": weight}, (x, padding if padded else None))

    def results(x, weight):
        routing = route(x, weight)
        visible = ~padding[:, None]
        balance = routing.load_balance_loss + 0.0 * x.sum()  # which has no gradient where it is constant
        return torch.where(visible, by_token(routing)[1], 0.0), balance, routing.z_loss

    ids, _ = by_token(route(**inputs))
    check_op(results, lambda x, weight: loop_over_routed(router, ids, padding, x, weight), inputs)


WEIGHTS = {
    "gate_up": ("gate_up_proj", (E, 2 * N, D)), "down": ("down_proj", (E, D, N)),
    "shared_gate": ("shared.gate_proj.weight", (5, D)), "shared_up": ("shared.up_proj.weight", (5, D)),
    "shared_down": ("shared.down_proj.weight", (D, 5)),
}  # fmt: skip


@every_router
@dtypes
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
def test_a_layer_is_the_loop_over_tokens(kind, gated, dtype):
    router = ROUTERS[kind]()
    layer = nn.MoE(router, D, N, gated=gated, shared=nn.GatedMLP(D, 5))
    inputs = router_inputs(dtype) | {
        name: random_tensor(*shape, dtype=dtype, seed=seed, scale=0.3)
        for seed, (name, (_, shape)) in enumerate(WEIGHTS.items(), 7)
    }

    if not gated:
        inputs["gate_up"] = inputs["gate_up"].detach()[:, :N].requires_grad_()

    def run(x, weight, **weights):
        named = {WEIGHTS[name][0]: tensor for name, tensor in weights.items()}
        return functional_call(layer, named | {"router.weight": weight}, (x, PADDING))

    ids, _ = by_token(run(**inputs)[1])
    capacity = getattr(router, "capacity", lambda _: None)(T)

    def results(x, weight, **weights):
        y, routing = run(x, weight, **weights)
        return y, routing.load_balance_loss + 0.0 * x.sum(), routing.z_loss

    def loop(x, weight, gate_up, down, shared_gate, shared_up, shared_down):
        of_choices, *losses = loop_over_routed(router, ids, PADDING, x, weight)
        y = loop_over_tokens(x, ids, of_choices, gate_up, down, capacity=capacity)
        hidden = F.silu(F.linear(x, shared_gate)) * F.linear(x, shared_up)
        return y + F.linear(hidden, shared_down), *losses

    check_op(results, loop, inputs)


LAYERS = {
    "SwitchFFN": lambda: nn.SwitchFFN(D, N, 4, capacity_factor=1.0),
    "MoE": lambda: nn.MoE(
        nn.TopKRouter(D, E, 2, scores="sigmoid", normalize=True, score_bias=True), D, N, shared=nn.GatedMLP(D, 5)
    ),
}


@on_every_compiler
@pytest.mark.parametrize("kind", LAYERS)
def test_compiles_whole_with_its_backward_and_equals_eager(kind, backend):
    layer = LAYERS[kind]()
    if backend == "inductor":
        layer.router.jitter = 0.0  # whose seed would be drawn from another generator
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    found = []
    for run in (layer, compiled):
        torch.manual_seed(0)
        layer.zero_grad()
        x = random_tensor(T, D, dtype=torch.float32)
        y, routing = run(x, PADDING)
        loss = y.square().mean() + routing.load_balance_loss + 1e-2 * routing.z_loss
        loss.backward()
        found.append([loss, x.grad, *(parameter.grad for parameter in layer.parameters())])
    for eager, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, eager)
    ill = x.detach().clone()
    ill[1] = torch.nan
    with pytest.raises(RuntimeError, match="logits: expected finite numbers, got NaN"):
        compiled(ill.requires_grad_(), PADDING)


@pytest.mark.parametrize("kind", LAYERS)
def test_inference_compiles_whole_and_equals_eager(kind):
    torch.compiler.reset()
    layer, x = LAYERS[kind]().eval(), random_tensor(T, D, dtype=torch.float32).detach()
    with torch.no_grad():
        eager, ours = (run(x)[0] for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")))
    torch.testing.assert_close(ours, eager)


def test_experts_that_choose_compile_whole_and_equal_eager():
    torch.compiler.reset()  # the layers above have made it compile `MoE.forward` as often as it may
    layer = nn.MoE(nn.ExpertChoiceRouter(D, E), D, N)
    found = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        x = random_tensor(T, D, dtype=torch.float32)
        y, routing = run(x, PADDING)
        (y.square().mean() + 1e-2 * routing.z_loss).backward()
        found.append([y, x.grad, *(parameter.grad for parameter in layer.parameters())])
    for eager, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, eager)


WIDE, TOKENS = 128, 64


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.SwitchFFN(WIDE, N, 4, capacity_factor=None),
        lambda: nn.MoE(nn.TopKRouter(WIDE, 4, 2, normalize=True, jitter=1e-2), WIDE, N),
        lambda: nn.MoE(
            nn.TopKRouter(WIDE, 4, 2, scores="sigmoid", score_bias=True), WIDE, N, shared=nn.GatedMLP(WIDE, 5)
        ),
    ],
    ids=["SwitchFFN", "MoE", "shared"],
)
def test_x_is_kept_once_as_it_is(make):
    """By router, experts and shared experts together, and besides it what T, E and k make up."""
    layer, x = make().bfloat16(), random_tensor(TOKENS, WIDE, dtype=torch.bfloat16)
    k = layer.router(x).expert_ids.shape[1]
    kept = saved_bytes(lambda: layer(x), exclude=tuple(layer.parameters()))
    # Of an expert scores and logits; of a choice its two rows, its index, and its weight before and after a division.
    routing = TOKENS * (12 * 4 + 24 * k + 16) + 128
    assert x.nbytes < kept < x.nbytes + routing < 2 * x.nbytes


def test_losses_have_their_gradients_through_a_checkpoint_that_is_not_reentrant():
    layer, x = nn.MoE(ROUTERS["normalized"](), D, N, recompute=False), torch.randn(T, D)

    def result(run):
        y, routing = run(x.clone().requires_grad_())
        return y, routing.load_balance_loss + routing.z_loss

    def gradients(of):
        return torch.autograd.grad(sum(part.sum() for part in of), list(layer.parameters()), retain_graph=True)

    expected = gradients(result(layer))
    checkpointed = result(partial(checkpoint, layer, use_reentrant=False))
    for _ in range(2):  # its graph is retained
        assert all(map(torch.equal, gradients(checkpointed), expected))
    assert not result(partial(checkpoint, layer, use_reentrant=True))[1].requires_grad
