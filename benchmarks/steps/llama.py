"""Forward and backward of a Llama: transformers as it is, under torch.compile, with gradient checkpointing, patched."""

from __future__ import annotations

import torch

from memkernels import patch
from memkernels.bench import Benchmark, Case, Step, Work


def setup(case: Case, provider: str) -> Step:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = case.sizes
    config = LlamaConfig(
        hidden_size=sizes["width"],
        intermediate_size=sizes["feed_forward"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["q_heads"],
        num_key_value_heads=sizes["k_heads"],
        vocab_size=sizes["vocabulary"],
        max_position_embeddings=sizes["tokens"],
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(case.device, case.dtype).train()
    tokens = torch.randint(sizes["vocabulary"], (1, sizes["tokens"]), device=case.device)
    parameters = tuple(model.parameters())
    if provider == "checkpoint":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    elif provider == "compile":
        model = torch.compile(model)
    elif provider.startswith("memkernels"):
        patch(model, recompute=provider.removeprefix("memkernels-"))
    return Step(lambda: model(input_ids=tokens, labels=tokens).loss, parameters=parameters)


def work(case: Case, mode: str) -> Work:
    """FLOPs of the matrix products and of causal attention, without recomputation; backward has twice the forward's."""
    sizes = case.sizes
    width, tokens = sizes["width"], sizes["tokens"]
    keys = width * sizes["k_heads"] // sizes["q_heads"]
    layer = 2 * width * (width + keys) + 3 * width * sizes["feed_forward"]
    products = sizes["layers"] * layer + width * sizes["vocabulary"]
    attention = sizes["layers"] * tokens * width
    forward = 2 * tokens * (products + attention)
    return Work(flops=forward * {"forward": 1, "backward": 2, "full": 3}[mode])


LLAMA = {
    "width": 1024,
    "feed_forward": 2816,
    "layers": 6,
    "q_heads": 16,
    "k_heads": 4,
    "vocabulary": 32000,
    "tokens": 2048,
}

benchmark = Benchmark(
    op="llama",
    cases=(Case("d1024-f2816-L6-V32000-T2048", torch.bfloat16, LLAMA),),
    providers=("eager", "compile", "checkpoint", "memkernels-sublayer", "memkernels-layer"),
    setup=setup,
    work=work,
    modes=("full",),
)
