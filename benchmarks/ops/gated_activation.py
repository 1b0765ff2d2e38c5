"""The gated activation: eager PyTorch, torch.compile, memkernels."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from memkernels.bench import Benchmark, Case, Step, Work
from memkernels.ops.gated_activation.reference import gated_activation as eager


def setup(case: Case, provider: str) -> Step:
    from memkernels.ops import gated_activation

    shape = (case.sizes["tokens"], case.sizes["width"])
    gate, up = (torch.randn(shape, dtype=case.dtype, device=case.device, requires_grad=True) for _ in range(2))
    function = {"eager": eager, "compile": torch.compile(eager), "memkernels": gated_activation}[provider]
    activation = "gelu" if case.sizes["gelu"] else "silu"
    return Step(lambda: function(gate, up, activation), (gate, up), ())


def work(case: Case, mode: str) -> Work:
    """Forward reads gate and up and writes h; backward reads dh, gate and up and writes dgate and dup."""
    tensors = {"forward": 3, "backward": 5, "full": 8}[mode]
    return Work(bytes=tensors * case.sizes["tokens"] * case.sizes["width"] * case.dtype.itemsize)


def cases() -> Iterator[Case]:
    for gelu, dtype in itertools.product((False, True), (torch.float32, torch.bfloat16)):
        yield Case(f"T4096-f2816-{'gelu' if gelu else 'silu'}", dtype, {"tokens": 4096, "width": 2816, "gelu": gelu})


benchmark = Benchmark(
    op="gated_activation",
    cases=tuple(cases()),
    providers=("eager", "compile", "memkernels"),
    setup=setup,
    work=work,
)
