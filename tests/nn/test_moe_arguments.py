"""Wrong arguments of the dispatch's ops, of routers and of the layers over them: each error names its argument."""

import pytest
import torch

from memkernels import nn, ops

T, D, E, N = 9, 8, 4, 6
IDS = torch.zeros(T, 2, dtype=torch.int64)
X, WEIGHTS, GATE_UP, DOWN = torch.zeros(T, D), torch.zeros(T, 2), torch.zeros(E, 2 * N, D), torch.zeros(E, D, N)


def make_router(k=2, **options):
    return nn.TopKRouter(D, E, k, **options)


def call_layer(x, padding_mask=None):
    return nn.MoE(make_router(), D, N)(x, padding_mask)


WRONG = [
    (lambda: ops.moe_plan(IDS, E, capacity=2.5), TypeError, "capacity: expected at least 1 or None, got 2.5"),
    (lambda: ops.moe_plan(IDS, E, capacity=True), TypeError, "capacity: expected at least 1 or None, got True"),
    (lambda: ops.moe_plan(IDS, 4.0), TypeError, "num_experts: expected at least 1, got 4.0"),
    (lambda: ops.moe_plan([[0]], E), TypeError, "expert_ids: expected int64 or int32, got list"),
    (lambda: ops.expert_choice_plan([[0]], T), TypeError, "token_ids: expected int64 or int32, got list"),
    (lambda: ops.expert_choice_plan(IDS, 2.5), TypeError, "num_tokens: expected an integer from 0 up, got 2.5"),
    (lambda: ops.expert_choice_plan(IDS, -1), ValueError, "num_tokens: expected an integer from 0 up, got -1"),
    (lambda: ops.moe_combine(X, (IDS, IDS)), TypeError, "plan: expected a DispatchPlan, got tuple"),
    (lambda: ops.grouped_matmul(X, GATE_UP, IDS), TypeError, "plan: expected a DispatchPlan, got Tensor"),
    (lambda: ops.moe_mlp(X, IDS, WEIGHTS, GATE_UP, DOWN, recompute="layer"), TypeError, "recompute: expected True or"),
    (lambda: ops.moe_mlp(X, IDS, WEIGHTS, GATE_UP, DOWN[0]), ValueError, r"w_down: expected shape \(E, d, n\)"),
    (lambda: ops.moe_mlp(X, IDS, WEIGHTS, GATE_UP, DOWN[:0]), ValueError, "w_down: .* at least one expert"),
    (lambda: make_router(2.5), TypeError, "k: expected a positive integer, got 2.5"),
    (lambda: make_router(num_groups=2.0), TypeError, "num_groups: expected a positive integer, got 2.0"),
    (lambda: make_router(num_groups=2, top_groups=1.5), TypeError, "top_groups: expected a positive integer, got 1.5"),
    (lambda: make_router(scaling=float("nan")), ValueError, "scaling: expected a finite number, got nan"),
    (lambda: make_router(normalize=None), TypeError, "normalize: expected True or False, got None"),
    (lambda: make_router(score_bias=1.0), TypeError, "score_bias: expected True or False, got 1.0"),
    (lambda: make_router(score_bias=True).update_bias([1] * E), TypeError, "counts: expected a tensor, got list"),
    (lambda: nn.SwitchRouter(0, E), ValueError, "hidden_size: expected a positive integer, got 0"),
    (lambda: nn.MoE("top_k", D, N), TypeError, "router: expected a Router, got str"),
    (lambda: nn.MoE(make_router(), D + 1, N), ValueError, "hidden_size: expected 8, that of router, got 9"),
    (lambda: nn.MoE(make_router(), D, N, shared=GATE_UP), TypeError, "shared: expected a module or None, got Tensor"),
    (lambda: nn.MoE(make_router(), D, N, dtype=torch.int8), TypeError, "dtype: expected float32, .* got torch.int8"),
    (lambda: nn.MoE(make_router(), D, N).adapt(2, dtype=torch.int8), TypeError, "dtype: expected float32, .*"),
    (lambda: make_router(dtype=torch.int8), TypeError, "dtype: expected float32, .* got torch.int8"),
    (lambda: nn.MoE(make_router(), D, N, gated=1), TypeError, "gated: expected True or False, got 1"),
    (lambda: nn.MoE(make_router(), D, N, recompute="none"), TypeError, "recompute: expected True or False, got 'none'"),
    (lambda: nn.MoE(make_router(), D, 0), ValueError, "expert_size: expected a positive integer, got 0"),
    (lambda: call_layer(X[:, :5]), ValueError, r"x: expected shape \(..., 8\), got \(9, 5\)"),
    (lambda: call_layer(X.sum()), ValueError, r"x: expected shape \(..., 8\), got \(\)"),
    (lambda: call_layer([1.0]), TypeError, "x: expected a tensor, got list"),
    (lambda: call_layer(X, [True] * T), TypeError, "padding_mask: expected a tensor or None, got list"),
    (lambda: call_layer(X.view(3, 3, D), torch.zeros(9) > 0), ValueError, r"padding_mask: .* of shape \(3, 3\)"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
