"""Forward and backward of a SwitchTransformers with its dropout: transformers as it is, with gradient checkpointing,
patched."""

from __future__ import annotations

import torch

from memkernels import patch
from memkernels.bench import Benchmark, Case, Step, Work


def setup(case: Case, provider: str) -> Step:
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    sizes = case.sizes
    config = SwitchTransformersConfig(
        d_model=sizes["width"],
        d_ff=sizes["feed_forward"],
        d_kv=64,
        num_heads=sizes["width"] // 64,
        num_layers=sizes["layers"],
        num_decoder_layers=sizes["layers"],
        num_sparse_encoder_layers=sizes["layers"] // 2,
        num_sparse_decoder_layers=sizes["layers"] // 2,
        num_experts=sizes["experts"],
        expert_capacity=sizes["tokens"],
        vocab_size=sizes["vocabulary"],
        decoder_start_token_id=0,
    )
    model = SwitchTransformersForConditionalGeneration(config).to(case.device, case.dtype).train()
    if provider == "checkpoint":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    elif provider.startswith("memkernels"):
        patch(model, recompute=provider.removeprefix("memkernels-"))
    tokens = torch.randint(1, sizes["vocabulary"], (2, sizes["tokens"]), device=case.device)
    return Step(
        lambda: model(input_ids=tokens, labels=tokens, use_cache=False).loss, parameters=tuple(model.parameters())
    )


def work(case: Case, mode: str) -> Work:
    """FLOPs of the matrix products and of attention, without recomputation; backward has twice the forward's."""
    sizes = case.sizes
    width, tokens = sizes["width"], 2 * sizes["tokens"]
    projections = sizes["layers"] * (12 * width**2 + 4 * width * sizes["feed_forward"])
    attention = sizes["layers"] * 3 * 2 * sizes["tokens"] * width
    forward = 2 * tokens * (projections + attention + width * sizes["vocabulary"])
    return Work(flops=forward * {"forward": 1, "backward": 2, "full": 3}[mode])


SWITCH = {
    "width": 512,
    "feed_forward": 2048,
    "layers": 4,
    "experts": 8,
    "vocabulary": 32128,
    "tokens": 512,
}

benchmark = Benchmark(
    op="switch",
    cases=(Case("d512-f2048-L4+4-E8-V32128-T2x512-dropout10%", torch.bfloat16, SWITCH),),
    providers=("eager", "checkpoint", "memkernels-none", "memkernels-sublayer", "memkernels-layer"),
    setup=setup,
    work=work,
    modes=("full",),
)
