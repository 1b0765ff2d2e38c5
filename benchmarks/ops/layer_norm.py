"""Layer norm: torch's own operator, torch.compile of it, memkernels; with and without a residual added first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from memkernels.bench import Benchmark, Case, Step, Work


def eager(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor | None = None):
    if residual is not None:
        x = x + residual
    y = torch.nn.functional.layer_norm(x, weight.shape, weight, bias)
    return y if residual is None else (y, x)


def setup(case: Case, provider: str) -> Step:
    shape = (case.sizes["tokens"], case.sizes["width"])
    x = torch.randn(shape, dtype=case.dtype, device=case.device, requires_grad=True)
    weight, bias = (torch.randn_like(x[0], requires_grad=True) for _ in range(2))
    residual = torch.randn_like(x, requires_grad=True) if case.sizes["residual"] else None
    inputs = (x,) if residual is None else (x, residual)
    if provider == "memkernels":
        from memkernels.ops import layer_norm

        return Step(lambda: layer_norm(x, weight, bias, residual=residual), inputs, (weight, bias))
    function = {"eager": eager, "compile": torch.compile(eager)}[provider]
    return Step(lambda: function(x, weight, bias, residual), inputs, (weight, bias))


def work(case: Case, mode: str) -> Work:
    """Forward reads x (and residual) and writes y (and their sum); backward reads dy, x (and dsum) and writes dx."""
    forward, backward = (4, 4) if case.sizes["residual"] else (2, 3)
    tensors = {"forward": forward, "backward": backward, "full": forward + backward}[mode]
    return Work(bytes=tensors * case.sizes["tokens"] * case.sizes["width"] * case.dtype.itemsize)


def cases() -> Iterator[Case]:
    shapes = [(4096, 1024), (2048, 4096)]
    for (tokens, width), residual, dtype in itertools.product(shapes, [False, True], [torch.float32, torch.bfloat16]):
        name = f"T{tokens}-d{width}{'-residual' if residual else ''}"
        yield Case(name, dtype, {"tokens": tokens, "width": width, "residual": residual})


benchmark = Benchmark(
    op="layer_norm",
    cases=tuple(cases()),
    providers=("eager", "compile", "memkernels"),
    setup=setup,
    work=work,
)
