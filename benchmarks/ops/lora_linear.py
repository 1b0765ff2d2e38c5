"""A frozen linear layer with a LoRA adapter: the layer alone, PEFT's eager one, memkernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from memkernels.bench import Benchmark, Case, Step, Work

TOKENS, RANK = 4096, 16


def setup(case: Case, provider: str) -> Step:
    size, dropout = case.sizes["size"], case.sizes["dropout_percent"] / 100
    options = {"device": case.device, "dtype": case.dtype}
    base = torch.nn.Linear(size, size, **options).requires_grad_(False)
    x = torch.randn(TOKENS, size, **options).requires_grad_()
    if provider == "base":
        return Step(lambda: base(x), (x,))
    if provider == "memkernels":
        from memkernels.nn import LoRALinear

        layer = LoRALinear(base, RANK, dropout=dropout, dtype=case.dtype)
    else:
        import peft

        config = peft.LoraConfig(r=RANK, lora_alpha=32, lora_dropout=dropout, target_modules=["0"])
        model = peft.get_peft_model(torch.nn.Sequential(base), config, autocast_adapter_dtype=False)
        layer = model.base_model.model[0]
    parameters = tuple(parameter for parameter in layer.parameters() if parameter.requires_grad)
    return Step(lambda: layer(x), (x,), parameters)


def work(case: Case, mode: str) -> Work:
    """The products of the base layer with the gradient of its input."""
    return Work(flops=2 * 2 * TOKENS * case.sizes["size"] ** 2)


def cases() -> Iterator[Case]:
    for size in (1024, 4096):
        for dtype in (torch.bfloat16, torch.float32):
            for percent in (0, 10):
                name = f"T{TOKENS}-K{size}-N{size}-r{RANK}{f'-dropout{percent}%' if percent else ''}"
                yield Case(name, dtype, {"size": size, "dropout_percent": percent})


benchmark = Benchmark(
    op="lora_linear",
    cases=tuple(cases()),
    providers=("base", "peft", "memkernels"),
    setup=setup,
    work=work,
    baseline="base",
    modes=("full",),
)
