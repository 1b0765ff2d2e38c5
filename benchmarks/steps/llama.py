"""Forward and backward of a Llama: transformers as it is, under torch.compile, with gradient checkpointing, patched.

"selective" is checkpointing that keeps the outputs of the attention operator: with a layer's input what
`recompute="layer"` keeps. The case without a head is the layers alone, where nothing else is saved.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from memkernels import patch
from memkernels.bench import Benchmark, Case, Step, Work
from memkernels.bench.llama import LLAMA, llama_config


def setup(case: Case, provider: str) -> Step:
    from transformers import LlamaForCausalLM

    sizes = case.sizes
    model = LlamaForCausalLM(llama_config(sizes)).to(case.device, case.dtype).train()
    if provider == "checkpoint":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    elif provider == "selective":
        contexts = partial(create_selective_checkpoint_contexts, ATTENTION_OPERATORS)
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
    elif provider.startswith("memkernels"):
        patch(model, recompute=provider.removeprefix("memkernels-"))
    return whole_step(model, case, provider) if sizes["head"] else step_of_layers(model, case, provider)


def whole_step(model: torch.nn.Module, case: Case, provider: str) -> Step:
    tokens = torch.randint(case.sizes["vocabulary"], (1, case.sizes["tokens"]), device=case.device)
    function = torch.compile(model) if provider == "compile" else model
    return Step(lambda: function(input_ids=tokens, labels=tokens).loss, parameters=tuple(model.parameters()))


def step_of_layers(model: torch.nn.Module, case: Case, provider: str) -> Step:
    shape = 1, case.sizes["tokens"], case.sizes["width"]
    x = torch.randn(shape, dtype=case.dtype, device=case.device, requires_grad=True)
    rotation = model.model.rotary_emb(x, torch.arange(shape[1], device=case.device)[None])

    def layers(x: torch.Tensor) -> torch.Tensor:
        for layer in model.model.layers:
            x = layer(x, position_embeddings=rotation, attention_mask=None)
        return x

    function = torch.compile(layers) if provider == "compile" else layers
    return Step(lambda: function(x), (x,), (*model.model.layers.parameters(), *rotation))


def work(case: Case, mode: str) -> Work:
    """FLOPs of the matrix products and of causal attention, without recomputation; backward has twice the forward's."""
    sizes = case.sizes
    width, tokens = sizes["width"], sizes["tokens"]
    keys = width * sizes["k_heads"] // sizes["q_heads"]
    layer = 2 * width * (width + keys) + 3 * width * sizes["feed_forward"]
    products = sizes["layers"] * layer + width * sizes["vocabulary"] * sizes["head"]
    attention = sizes["layers"] * tokens * width
    forward = 2 * tokens * (products + attention)
    return Work(flops=forward * {"forward": 1, "backward": 2, "full": 3}[mode])


ATTENTION_OPERATORS = [
    getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default
    for name in ("flash_attention_for_cpu", "flash_attention", "cudnn_attention")
]
benchmark = Benchmark(
    op="llama",
    cases=(
        Case("d1024-f2816-L6-V32000-T2048", torch.bfloat16, LLAMA | {"head": 1}),
        Case("d1024-f2816-L6-V32000-T2048", torch.float32, LLAMA | {"head": 1}),
        Case("d1024-f2816-L6-T2048-layers", torch.bfloat16, LLAMA | {"head": 0}),
    ),
    providers=("eager", "compile", "checkpoint", "selective", "memkernels-sublayer", "memkernels-layer"),
    setup=setup,
    work=work,
    modes=("full",),
)
