"""One check for every op: outputs and all gradients against the op's reference in float64, by the factor-two rule."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from memkernels.testing.memory import poisoned_memory
from memkernels.testing.tolerance import assert_within_factor_two


def random_tensor(*shape: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0, scale: float = 1.0) -> Tensor:
    """Standard normal values times scale, the same on every device, with gradient."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    return values.to(dtype).to(device).requires_grad_()


def _run(function: Callable, inputs: dict[str, Tensor], options: dict, dtype: torch.dtype | None, strided_grads: bool):
    """Outputs and gradients, with cotangents that depend on the outputs' shapes alone."""
    copies = {}
    for name, tensor in inputs.items():
        copy = tensor.detach().to(dtype) if dtype is not None and tensor.is_floating_point() else tensor.detach()
        copies[name] = copy.requires_grad_(tensor.requires_grad)
    outputs = function(**copies, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    cotangents = []
    for index, output in enumerate(outputs):
        generator = torch.Generator().manual_seed(1000 + index)
        values = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        # The oracle gets the cotangent as the op sees it: rounded to the inputs' dtype.
        rounded = values.to(next(t.dtype for t in inputs.values() if t.is_floating_point())).to(output)
        if strided_grads and rounded.dim() > 1:
            rounded = rounded.transpose(0, -1).contiguous().transpose(0, -1)
        cotangents.append(rounded)
    wanted = {name: copy for name, copy in copies.items() if copy.requires_grad}
    gradients = torch.autograd.grad(outputs, tuple(wanted.values()), tuple(cotangents)) if wanted else ()
    return outputs, dict(zip(wanted, gradients, strict=True))


def check_op(
    function: Callable,
    reference: Callable,
    inputs: dict[str, Tensor],
    *,
    strided_grads: bool = False,
    roundings: float = 1.0,
    atol: float = 1e-6,
    **options: object,
) -> None:
    """Asserts that `function(**inputs, **options)` and its gradients agree with `reference`.

    `reference` runs twice: in float64, the oracle, and at the inputs' own dtypes, the error of plain PyTorch. The
    function runs with fresh memory filled with NaN. `strided_grads` makes the incoming gradients non-contiguous.
    """
    with poisoned_memory():
        outputs, gradients = _run(function, inputs, options, None, strided_grads)
    exact_outputs, exact_gradients = _run(reference, inputs, options, torch.float64, strided_grads)
    plain_outputs, plain_gradients = _run(reference, inputs, options, None, strided_grads)
    for index, (actual, exact, plain) in enumerate(zip(outputs, exact_outputs, plain_outputs, strict=True)):
        assert_within_factor_two(f"output {index}", actual, exact, plain, roundings=roundings, atol=atol)
    for name, exact in exact_gradients.items():
        assert_within_factor_two(
            f"gradient of {name}", gradients[name], exact, plain_gradients[name], roundings=roundings, atol=atol
        )
