"""Routers by their definitions, and the layers over them."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import pytest
import torch

from memkernels import nn
from memkernels.testing import random_tensor, saved_bytes

T, D, E = 24, 8, 6


def tokens(count: int = T, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return random_tensor(count, D, dtype=dtype)


def with_weight(router, seed: int = 5):
    router.weight.data.copy_(random_tensor(*router.weight.shape, dtype=torch.float64, seed=seed).detach())
    return router


def probabilities(router, x) -> torch.Tensor:
    """In float64."""
    return (x.detach().double() @ router.weight.detach().double().t()).softmax(1)


def test_switch_router_is_the_papers():
    router = with_weight(nn.SwitchRouter(D, E, capacity_factor=1.0))
    x = tokens()
    routing = router(x)
    p = probabilities(router, x)
    ids = p.argmax(1)
    assert torch.equal(routing.expert_ids[:, 0], ids)
    torch.testing.assert_close(routing.expert_weights[:, 0].double(), p.amax(1), rtol=1e-5, atol=1e-6)
    fraction = torch.bincount(ids, minlength=E).double() / T
    torch.testing.assert_close(routing.load_balance_loss.double(), E * (fraction * p.mean(0)).sum(), rtol=1e-5, atol=0)
    z = (x.detach().double() @ router.weight.detach().double().t()).logsumexp(1).square().mean()
    torch.testing.assert_close(routing.z_loss.double(), z, rtol=1e-5, atol=0)
    # Capacity: the first T / E tokens of each expert have a row, in their order; the rest is dropped.
    for expert in range(E):
        kept = (routing.plan.row_of_pair[ids == expert, 0] >= 0).tolist()
        assert kept == [place < math.ceil(T / E) for place in range(len(kept))]
    assert routing.plan.dropped.tolist() == [max(0, int((ids == e).sum()) - math.ceil(T / E)) for e in range(E)]


def test_a_balanced_load_has_loss_one_and_its_gradient_evens_the_load():
    router = nn.SwitchRouter(E, E)
    router.weight.data = torch.eye(E)
    assert abs(router(30 * torch.eye(E)).load_balance_loss.item() - 1) < 1e-6
    crowded = torch.eye(E)[torch.zeros(12, dtype=torch.int64)]
    loss = router(crowded).load_balance_loss
    assert loss > 1
    (grad,) = torch.autograd.grad(loss, router.weight)
    assert grad[0, 0] > 0 and (grad[1:, 0] < 0).all()  # a step against it takes the crowded expert's logit down


@pytest.mark.parametrize("training", [True, False])
def test_capacity_factor_of_training_and_evaluation(training):
    router = nn.SwitchRouter(D, E, capacity_factor=1.25, eval_capacity_factor=None).train(training)
    assert router.capacity(100) == (21 if training else None)
    assert nn.SwitchRouter(D, E, capacity_factor=0.1).capacity(3) == 1


@pytest.mark.parametrize("experts", [3, 10, 64, 96])
def test_capacity_is_exact(experts):
    """In numbers as they are written: 1.1 * 100 / 10 is 11, of which floating point makes a little more."""
    switch, choice = nn.SwitchRouter(D, experts), nn.ExpertChoiceRouter(D, experts)
    factors = [Fraction(hundredths, 100) for hundredths in range(1, 401, 3)] + [Fraction(n, 9) for n in range(1, 18)]
    for factor, tokens in product(factors, (100, 288, 4095, 4096, 1_000_000)):
        switch.capacity_factor = choice.capacity_factor = float(factor)
        exact = factor * tokens / experts
        assert switch.capacity(tokens) == max(1, math.ceil(exact)), factor
        assert choice.capacity(tokens) == max(1, min(tokens, math.floor(exact))), factor


def test_softmax_router_is_mixtrals():
    x = tokens()
    router = with_weight(nn.TopKRouter(D, E, 2, normalize=True))
    routing = router(x)
    p = probabilities(router, x)
    weights, ids = p.topk(2, 1)
    assert torch.equal(routing.expert_ids, ids)
    torch.testing.assert_close(
        routing.expert_weights.double(), weights / weights.sum(1, keepdim=True), rtol=1e-5, atol=1e-6
    )
    after = with_weight(nn.TopKRouter(D, E, 2, scores="softmax_of_top_k"))(x)
    torch.testing.assert_close(after.expert_weights, routing.expert_weights, rtol=1e-5, atol=1e-6)
    plain = with_weight(nn.TopKRouter(D, E, 2, scaling=3.0))(x)
    torch.testing.assert_close(plain.expert_weights.double(), 3 * weights, rtol=1e-5, atol=1e-6)
    assert routing.plan.dropped.sum() == 0 and routing.plan.counts[:E].sum() == 2 * T


def test_load_balance_loss_is_transformers():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    routing = with_weight(nn.TopKRouter(D, E, 2))(tokens())
    expected = load_balancing_loss_func((routing.logits.detach(),), E, 2)
    torch.testing.assert_close(routing.load_balance_loss.detach(), expected)


def test_sigmoid_router_with_groups_and_bias_is_deepseeks():
    from transformers.models.deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = DeepseekV3Config(
        hidden_size=16, n_routed_experts=12, num_experts_per_tok=3, n_group=4, topk_group=2, routed_scaling_factor=2.5,
        norm_topk_prob=True,
    )  # fmt: skip
    theirs = DeepseekV3TopkRouter(config)
    theirs.weight.data.copy_(random_tensor(12, 16, dtype=torch.float32, seed=3).detach())
    theirs.e_score_correction_bias.copy_(torch.linspace(-0.3, 0.3, 12))
    ours = nn.TopKRouter(
        16, 12, 3, scores="sigmoid", normalize=True, scaling=2.5, num_groups=4, top_groups=2, score_bias=True
    )
    ours.weight.data.copy_(theirs.weight)
    ours.score_bias.copy_(theirs.e_score_correction_bias)
    x = random_tensor(40, 16, dtype=torch.float32)
    _, weights, ids = theirs(x)
    routing = ours(x)
    order, their_order = routing.expert_ids.argsort(1), ids.argsort(1)
    assert torch.equal(routing.expert_ids.gather(1, order), ids.gather(1, their_order))
    torch.testing.assert_close(routing.expert_weights.gather(1, order), weights.gather(1, their_order))


def test_bias_update_takes_load_from_crowded_experts():
    router = with_weight(nn.TopKRouter(D, E, 2, scores="sigmoid", score_bias=True), seed=9)
    x = random_tensor(400, D, dtype=torch.float32)
    before = router(x).plan.counts[:E]
    for _ in range(200):
        router.update_bias(router(x).plan.counts[:E], rate=1e-2)
    after = router(x).plan.counts[:E]
    assert after.float().std() < 0.3 * before.float().std()
    assert "score_bias" in router.state_dict()


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double", "load"])
def test_score_bias_stays_float32_whose_steps_a_narrower_one_swallows(cast):
    router = nn.TopKRouter(D, E, 2, score_bias=True)
    router.score_bias.fill_(1.0)
    if cast == "load":
        state = {name: tensor.bfloat16() for name, tensor in router.state_dict().items()}
        router.load_state_dict(state, assign=True)
    else:
        getattr(nn.MoE(router, D, 5), cast)()
    assert router.weight.dtype != torch.float32
    for _ in range(10):
        router.update_bias(torch.tensor([6, 0, 0, 0, 0, 0]), rate=1e-3)
    assert router.score_bias.dtype == torch.float32 and router.state_dict()["score_bias"] is not None
    torch.testing.assert_close(router.score_bias, torch.tensor([0.99, 1.01, 1.01, 1.01, 1.01, 1.01]))
    assert router.to("meta").score_bias.is_meta


def test_equal_scores_go_to_the_lower_expert():
    for router in (nn.SwitchRouter(D, E), nn.TopKRouter(D, E, 3), nn.TopKRouter(D, E, 3, scores="sigmoid")):
        router.weight.data.zero_()
        ids = router(tokens()).expert_ids
        assert torch.equal(ids, torch.arange(ids.shape[1]).expand_as(ids))


def test_expert_choice_router_is_the_papers():
    router = with_weight(nn.ExpertChoiceRouter(D, E, capacity_factor=2.0))
    x = tokens()
    routing = router(x)
    scores = probabilities(router, x)
    token = torch.repeat_interleave(routing.plan.token_offsets.diff().long())
    for expert in range(E):
        chosen = scores[:, expert].topk(2 * T // E).indices.sort().values
        assert torch.equal(token[routing.expert_ids == expert], chosen)
        assert torch.equal(routing.plan.token_of_row.view(E, -1)[expert].long(), chosen)
    assert routing.plan.dropped.sum() == 0 and routing.plan.pair_of_row.shape[0] == 2 * T
    expected = scores[token, routing.expert_ids]
    torch.testing.assert_close(routing.expert_weights.double(), expected, rtol=1e-5, atol=1e-6)


def test_what_experts_choose_is_kept_for_each_choice_and_token_alone():
    """Of a token and an expert logit and score, 8 bytes; the rest is of the experts' choices and the tokens."""
    experts, tokens = 128, 96
    layer = nn.MoE(nn.ExpertChoiceRouter(D, experts, capacity_factor=2.0), D, 7)
    x = random_tensor(tokens, D, dtype=torch.float32)
    choices = experts * layer.router.capacity(tokens)
    routing = layer.router(x)
    assert choices == experts and routing.expert_weights.shape == routing.expert_ids.shape == (choices,)
    assert sum(tensor.nbytes for tensor in routing.plan) == 8 * choices + 4 * (tokens + 1) + 8 * (experts + 1)
    kept = saved_bytes(lambda: layer(x), exclude=(x, *layer.parameters()))
    assert kept <= 8 * tokens * experts + 32 * choices + 16 * tokens + 16 * (experts + 1)


ROUTERS = {
    "switch": lambda **options: nn.SwitchRouter(D, E, capacity_factor=None, **options),
    "top_k": lambda **options: nn.TopKRouter(D, E, 2, normalize=True, **options),
    "sigmoid": lambda **options: nn.TopKRouter(D, E, 2, scores="sigmoid", **options),
    "expert_choice": lambda **options: nn.ExpertChoiceRouter(D, E, **options),
}
every_router = pytest.mark.parametrize("make", ROUTERS.values(), ids=ROUTERS)


@every_router
def test_padding_goes_nowhere_and_counts_in_no_loss(make):
    router = with_weight(make())
    x, padding = tokens(), torch.zeros(T, dtype=torch.bool)
    padding[[2, 3, 20]] = True
    routing = router(x, padding)
    if isinstance(router, nn.ExpertChoiceRouter):
        choices = routing.plan.token_offsets.diff()
        assert not choices[padding].any() and (routing.expert_ids[choices.sum() :] == E).all()
        return  # its capacity is of all tokens, padding included
    assert (routing.plan.row_of_pair[padding] == -1).all() and (routing.expert_ids[padding] == E).all()
    alone = router(x[~padding])
    torch.testing.assert_close(routing.load_balance_loss, alone.load_balance_loss)
    torch.testing.assert_close(routing.z_loss, alone.z_loss)
    assert torch.equal(routing.plan.counts[:E], alone.plan.counts[:E])
    router(x, torch.ones(T, dtype=torch.bool)).load_balance_loss.backward()  # nothing but padding
    assert not router.weight.grad.isnan().any()


@every_router
@pytest.mark.parametrize("value", [torch.nan, torch.inf])  # of which softmax makes NaN
def test_logits_that_are_not_finite_are_named_unless_they_are_of_padding(make, value):
    router, padding = with_weight(make()), torch.arange(T) == 3
    x = tokens().detach()
    x[3, 5] = value
    with pytest.raises(RuntimeError, match="logits: expected finite numbers, got NaN or an infinity: x or the weight"):
        router(x)
    x.requires_grad_()
    routing = router(x, padding)
    loss = routing.expert_weights.sum() + routing.load_balance_loss + routing.z_loss
    for gradient in torch.autograd.grad(loss, (x, router.weight)):
        assert gradient.isfinite().all()
    router.weight.data[2, 1] = value
    with pytest.raises(RuntimeError, match="logits: expected finite numbers"):
        router(tokens(), padding)


@every_router
def test_routing_is_float32_under_autocast_and_of_bfloat16(make):
    router = with_weight(make())
    x = tokens().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(x)
    assert routing.logits.dtype == routing.expert_weights.dtype == torch.float32
    assert torch.equal(routing.logits, router(x.float()).logits)


@every_router
def test_jitter_is_noise_in_training_alone(make):
    router = with_weight(make(jitter=0.1))
    x = tokens()
    torch.manual_seed(0)
    first, second = router(x).logits, router(x).logits
    assert not torch.equal(first, second)
    quiet = router.eval()(x).logits
    bound = 0.1 * (x.abs() @ router.weight.abs().t())
    assert ((first - quiet).abs() <= bound + 1e-5).all() and torch.equal(quiet, router(x).logits)


@every_router
def test_every_parameter_gets_its_gradient(make):
    layer = nn.MoE(with_weight(make()), D, 7, shared=nn.GatedMLP(D, 5))
    y, routing = layer(tokens())
    (y.square().sum() + routing.load_balance_loss + 1e-3 * routing.z_loss).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in layer.parameters())


def test_switch_ffn_learns():
    torch.manual_seed(0)
    layer = nn.SwitchFFN(D, 16, 4, jitter=0.0)
    target = torch.randn(D, D)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    losses = []
    for step in range(150):
        x = random_tensor(64, D, dtype=torch.float32, seed=step).detach()
        y, routing = layer(x)
        loss = (y - x @ target).square().mean() + 1e-2 * routing.load_balance_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_expert_dropout_is_of_training_alone():
    layer = nn.SwitchFFN(D, 16, 4, jitter=0.0, expert_dropout=0.4, capacity_factor=None, eval_capacity_factor=None)
    x = tokens()
    quiet = layer.eval()(x)[0]
    assert torch.equal(quiet, layer(x)[0])
    layer.train()
    mean = torch.stack([layer(x)[0].detach() for _ in range(400)]).mean(0)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    assert (mean - quiet).norm() < 0.15 * quiet.norm()


def test_a_dropped_token_is_zero_and_reported():
    layer = nn.SwitchFFN(D, 16, 4, capacity_factor=0.25, jitter=0.0)
    y, routing = layer(tokens())
    dropped = routing.plan.row_of_pair[:, 0] < 0
    assert dropped.sum() == routing.plan.dropped.sum() > 0
    assert not y[dropped].any() and (y[~dropped].abs().sum(1) > 0).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.SwitchRouter(D, 0), "num_experts: expected at least 1"),
        (lambda: nn.SwitchRouter(D, E, jitter=1.0), "jitter: expected at least 0 and less than 1"),
        (lambda: nn.SwitchRouter(D, E, capacity_factor=0.0), "capacity_factor: expected a positive number or None"),
        (lambda: nn.SwitchRouter(D, E, capacity_factor=math.inf), "capacity_factor: expected a positive number"),
        (lambda: nn.ExpertChoiceRouter(D, E, capacity_factor=-1), "capacity_factor: expected a positive number"),
        (lambda: nn.TopKRouter(D, E, 7), "k: expected 1 to 6"),
        (lambda: nn.TopKRouter(D, E, 3, num_groups=3), "k: expected 1 to 2"),
        (lambda: nn.TopKRouter(D, E, 2, num_groups=4), "num_groups: expected a divisor of num_experts"),
        (lambda: nn.TopKRouter(D, E, 2, num_groups=2, top_groups=3), "top_groups: expected 1 to num_groups"),
        (lambda: nn.TopKRouter(D, E, 2, scores="tanh"), "scores: expected one of"),
        (lambda: nn.TopKRouter(D, E, 2).update_bias(torch.zeros(E)), "score_bias: this router has none"),
        (lambda: nn.TopKRouter(D, E, 2, score_bias=True).update_bias(torch.zeros(5)), r"counts: expected shape \(6,\)"),
        (lambda: nn.SwitchRouter(D, E)(torch.zeros(T, 5)), r"x: expected shape \(T, 8\)"),
        (lambda: nn.SwitchRouter(D, E)(tokens(), torch.zeros(T)), r"padding_mask: expected bool of shape \(24,\)"),
        (lambda: nn.SwitchFFN(D, 7, E, expert_dropout=1.0), r"expert_dropout: expected a number in \[0, 1\)"),
        (lambda: nn.MoE(nn.SwitchRouter(D, E), D, 7, "tanh"), "activation: expected one of"),
    ],
)
def test_bad_input_names_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@every_router
def test_input_of_another_dtype_is_named(make):
    with pytest.raises(TypeError, match="x: expected float32, bfloat16, float16 or float64"):
        make()(torch.zeros(T, D, dtype=torch.int64))


@every_router
def test_bad_input_draws_no_noise(make):
    router = make(jitter=0.1)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="padding_mask: expected bool"):
        router(tokens(), torch.zeros(T))
    assert torch.equal(torch.get_rng_state(), before)
