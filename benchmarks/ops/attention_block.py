"""The attention half of a layer, norm in front: Hugging Face's modules in eager torch, torch.compile, memkernels."""

from __future__ import annotations

import torch

from memkernels.bench import Benchmark, Case, Step, Work

EPS = 1e-6
FACTOR = {"forward": 1, "backward": 2, "full": 3}


def setup(case: Case, provider: str) -> Step:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, LlamaRotaryEmbedding

    tokens, d, heads, kv_heads = (case.sizes[name] for name in ("tokens", "width", "q_heads", "k_heads"))
    config = LlamaConfig(hidden_size=d, num_attention_heads=heads, num_key_value_heads=kv_heads, use_cache=False)
    config._attn_implementation = "sdpa"
    norm, layer = LlamaRMSNorm(d, EPS), LlamaAttention(config, 0)
    model = torch.nn.ModuleList([norm, layer]).to(case.device, case.dtype)
    x = torch.randn(1, tokens, d, dtype=case.dtype, device=case.device, requires_grad=True)
    cos, sin = LlamaRotaryEmbedding(config).to(case.device)(x, torch.arange(tokens, device=case.device)[None])
    parameters = tuple(model.parameters())
    if provider == "memkernels":
        from memkernels.ops import attention_block

        weights = {f"w_{name}": getattr(layer, f"{name}_proj").weight for name in "qkvo"}
        weights |= {"norm_weight": norm.weight, "cos": cos, "sin": sin}
        return Step(
            lambda: attention_block(x, **weights, num_heads=heads, norm_eps=EPS, causal=True),
            (x,),
            (*parameters, cos, sin),
        )

    def eager(x: torch.Tensor) -> torch.Tensor:
        return layer(norm(x), position_embeddings=(cos, sin), attention_mask=None)[0]

    function = {"eager": eager, "compile": torch.compile(eager)}[provider]
    return Step(lambda: function(x), (x,), (*parameters, cos, sin))


def work(case: Case, mode: str) -> Work:
    """The products of the projections and of causal attention; what memkernels recomputes is not counted as work."""
    tokens, d, heads, kv_heads = (case.sizes[name] for name in ("tokens", "width", "q_heads", "k_heads"))
    return Work(flops=FACTOR[mode] * 2 * tokens * d * (2 * d + 2 * d * kv_heads // heads + tokens))


SIZES = {"tokens": 2048, "width": 1024, "q_heads": 16, "k_heads": 4}

benchmark = Benchmark(
    op="attention_block",
    cases=tuple(Case("T2048-d1024-H16/4-D64", dtype, SIZES) for dtype in (torch.float32, torch.bfloat16)),
    providers=("eager", "compile", "memkernels"),
    setup=setup,
    work=work,
)
