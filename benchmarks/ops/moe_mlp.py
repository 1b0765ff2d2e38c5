"""The experts of a mixture: transformers' implementations against `ops.moe_mlp`, and the same rows through one MLP.

All experts have the same weights, so that "dense", one MLP for all T k rows with `ops.gated_activation` between its
products, gives the same y: it is the floor, the same products with no dispatch. It has one expert's parameters.
"""

from __future__ import annotations

import torch

from memkernels.bench import Benchmark, Case, Step, Work
from memkernels.ops import gated_activation, moe_mlp

D, N, E, K = 512, 1024, 16, 2


def experts(implementation: str, dtype: torch.dtype, w_gate_up, w_down):
    """transformers' module of expert weights."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(hidden_size=D, intermediate_size=N, num_local_experts=E, num_experts_per_tok=K)
    config._experts_implementation = implementation
    module = MixtralExperts(config)
    module.gate_up_proj, module.down_proj = torch.nn.Parameter(w_gate_up), torch.nn.Parameter(w_down)
    return module


def dense(x, w_gate, w_up, w_down):
    """Every choice of every token through one MLP; the choices' weights sum to one."""
    rows = x.repeat_interleave(K, dim=0)
    linear = torch.nn.functional.linear
    y = linear(gated_activation(linear(rows, w_gate), linear(rows, w_up)), w_down)
    return y.view(-1, K, D).mean(1)


def setup(case: Case, provider: str) -> Step:
    tokens, dtype = case.sizes["tokens"], case.dtype
    options = {"dtype": dtype, "device": case.device}
    x = torch.randn(tokens, D, **options).requires_grad_()
    w_gate_up = (torch.randn(1, 2 * N, D, **options) * D**-0.5).repeat(E, 1, 1)
    w_down = (torch.randn(1, D, N, **options) * N**-0.5).repeat(E, 1, 1)
    weights, ids = torch.randn(tokens, E, device=case.device).softmax(1).topk(K, dim=1)
    weights = (weights / weights.sum(1, keepdim=True)).to(dtype).requires_grad_()
    if provider == "dense":
        matrices = [matrix.clone().requires_grad_() for matrix in (*w_gate_up[0].chunk(2), w_down[0])]
        return Step(lambda: dense(x, *matrices), (x,), tuple(matrices))
    if provider.startswith("memkernels"):
        parameters = (w_gate_up.requires_grad_(), w_down.requires_grad_())
        recompute = provider == "memkernels-recompute"
        return Step(lambda: moe_mlp(x, ids, weights, *parameters, recompute=recompute), (x, weights), parameters)
    module = experts(provider, dtype, w_gate_up, w_down)
    return Step(lambda: module(x, ids, weights), (x, weights), tuple(module.parameters()))


def work(case: Case, mode: str) -> Work:
    """What memkernels recomputes is not counted as work."""
    products = {"forward": 3, "backward": 6, "full": 9}[mode]
    return Work(flops=products * 2 * case.sizes["tokens"] * K * N * D)


benchmark = Benchmark(
    op="moe_mlp",
    cases=tuple(
        Case(f"T4096-d{D}-n{N}-E{E}-k{K}", dtype, {"tokens": 4096}) for dtype in (torch.bfloat16, torch.float32)
    ),
    providers=("grouped_mm", "eager", "dense", "memkernels-keep", "memkernels-recompute"),
    setup=setup,
    work=work,
    baseline="grouped_mm",
)
