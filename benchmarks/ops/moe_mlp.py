"""The experts of a mixture: transformers' implementations against `ops.moe_mlp`, and the products alone.

"products" are the nine of a layer that keeps its pre-activation, each dense over all rows: the floor. They keep nothing
and are no layer, so that their memory says nothing.
"""

from __future__ import annotations

import torch

from memkernels.bench import Benchmark, Case, Step, Work

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


class Products(torch.autograd.Function):
    """The three products of forward and the six of backward, dense."""

    @staticmethod
    def forward(ctx, x, w_gate_up, w_down):
        gate_up = x @ w_gate_up.t()
        ctx.save_for_backward(x, gate_up, w_gate_up, w_down)
        return gate_up[:, :N].contiguous() @ w_down.t()

    @staticmethod
    def backward(ctx, dy):
        x, gate_up, w_gate_up, w_down = ctx.saved_tensors
        h = dy @ w_down
        return gate_up @ w_gate_up, gate_up.t() @ x, dy.t() @ h


def setup(case: Case, provider: str) -> Step:
    tokens, dtype = case.sizes["tokens"], case.dtype
    options = {"dtype": dtype, "device": case.device}
    x = torch.randn(tokens, D, **options).requires_grad_()
    w_gate_up = torch.randn(E, 2 * N, D, **options) * D**-0.5
    w_down = torch.randn(E, D, N, **options) * N**-0.5
    weights, ids = torch.randn(tokens, E, device=case.device).softmax(1).topk(K, dim=1)
    weights = (weights / weights.sum(1, keepdim=True)).to(dtype).requires_grad_()
    if provider == "products":
        rows = torch.randn(tokens * K, D, **options).requires_grad_()
        matrices = (w_gate_up[0].clone().requires_grad_(), w_down[0].clone().requires_grad_())
        return Step(lambda: Products.apply(rows, *matrices), (rows,), matrices)
    if provider.startswith("memkernels"):
        from memkernels.ops import moe_mlp

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
    providers=("grouped_mm", "eager", "products", "memkernels-keep", "memkernels-recompute"),
    setup=setup,
    work=work,
    baseline="grouped_mm",
)
