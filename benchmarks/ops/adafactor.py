"""A step of Adafactor over the matrices of two layers, without a first moment: torch's, transformers', memkernels.

Every ratio is to torch's step on float32 parameters.
"""

from __future__ import annotations

import functools

import torch

from memkernels.bench import Benchmark, Case, Step
from memkernels.optim import Adafactor

SHAPES = 2 * ((2048, 2048), (2048, 5632), (5632, 2048))
DTYPES = {"bfloat16": torch.bfloat16, "torch-bfloat16": torch.bfloat16}


@functools.cache
def parameters(dtype: torch.dtype, device: torch.device) -> list[torch.nn.Parameter]:
    params = []
    for shape in SHAPES:
        param = torch.nn.Parameter(torch.randn(shape, device=device).to(dtype))
        param.grad = torch.randn(shape, device=device).to(dtype)
        params.append(param)
    return params


def setup(case: Case, provider: str) -> Step:
    params = parameters(DTYPES.get(provider, torch.float32), case.device)
    # So small that parameters stay what they are for every provider's comparison.
    if provider.startswith("torch"):
        optimizer = torch.optim.Adafactor(params, lr=1e-7)
    elif provider == "transformers":
        from transformers.optimization import Adafactor as TransformersAdafactor

        optimizer = TransformersAdafactor(params, lr=1e-7, relative_step=False)
    else:
        optimizer = Adafactor(params, lr=1e-7)

    def forward():
        optimizer.step()
        return params[0].detach()[:4]

    return Step(forward)


benchmark = Benchmark(
    op="adafactor",
    cases=(Case("54M-6 matrices", torch.float32, {}),),
    providers=("torch", "torch-bfloat16", "transformers", "memkernels", "bfloat16"),
    setup=setup,
    baseline="torch",
    modes=("forward",),
)
