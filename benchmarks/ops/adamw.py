"""A step of AdamW over parameters in 12 tensors: torch's fused one in float32, two packages in 8 bits, memkernels.

Every ratio is to torch's fused step on float32 parameters with float32 states. All providers of a dtype share the
parameters and gradients, so that memory holds them once.
"""

from __future__ import annotations

import functools

import torch

from memkernels.bench import Benchmark, Case, Step
from memkernels.optim import AdamW

TENSORS = 12
SIZE = 99_999_744  # torchao quantises states of tensors in whole blocks of 256
OPTIONS = {
    "memkernels": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {}),
    "bfloat16-remainder": (torch.bfloat16, {"rounding": "remainder"}),
    "16bit": (torch.float32, {"state_bits": 16}),
    "8bit": (torch.float32, {"state_bits": 8}),
    "4bit": (torch.float32, {"state_bits": 4}),
    "bfloat16-8bit": (torch.bfloat16, {"state_bits": 8}),
}


@functools.cache
def parameters(size: int, dtype: torch.dtype, device: torch.device) -> list[torch.nn.Parameter]:
    """`size` elements in equal tensors, with gradients."""
    params = []
    for _ in range(TENSORS):
        param = torch.nn.Parameter(torch.randn(size // TENSORS, device=device).to(dtype))
        param.grad = torch.randn(size // TENSORS, device=device).to(dtype)
        params.append(param)
    return params


def setup(case: Case, provider: str) -> Step:
    dtype, options = OPTIONS.get(provider, (torch.float32, {}))
    params = parameters(case.sizes["size"], dtype, case.device)
    # So small that parameters stay what they are for every provider's comparison.
    if provider == "torch":
        optimizer = torch.optim.AdamW(params, lr=1e-7, fused=True)
    elif provider == "bitsandbytes-8bit":
        import bitsandbytes

        optimizer = bitsandbytes.optim.AdamW8bit(params, lr=1e-7, weight_decay=1e-2)
    elif provider == "torchao-8bit":
        from torchao.optim import AdamW8bit

        optimizer = AdamW8bit(params, lr=1e-7)
    else:
        optimizer = AdamW(params, lr=1e-7, **options)

    def forward():
        optimizer.step()
        return params[0].detach()[:4096]

    return Step(forward)


benchmark = Benchmark(
    op="adamw",
    cases=(Case("100M-12 tensors", torch.float32, {"size": SIZE}),),
    providers=("torch", *OPTIONS, "bitsandbytes-8bit", "torchao-8bit"),
    setup=setup,
    baseline="torch",
    modes=("forward",),
)
