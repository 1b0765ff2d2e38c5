"""Autocast: an op does what the layers do that it replaces."""

import torch


def check_autocast(op, layers, reference, inputs, to=torch.bfloat16):
    """float32 inputs under autocast to `to`: the result and every gradient have the dtypes that `layers` give, and
    at most twice their mean error against `reference` in float64.

    Backward runs inside the region too, as many training loops have it.
    """
    wanted = [name for name, tensor in inputs.items() if tensor.requires_grad]

    def run(function, dtype):
        copies = {name: of.detach().to(dtype).requires_grad_(of.requires_grad) for name, of in inputs.items()}
        with torch.autocast("cpu", to, enabled=dtype == torch.float32):
            y = function(**copies)
            return [y, *torch.autograd.grad(y, [copies[name] for name in wanted], torch.ones_like(y))]

    ours, plain, exact = run(op, torch.float32), run(layers, torch.float32), run(reference, torch.float64)
    for name, a, p, e in zip(("y", *wanted), ours, plain, exact, strict=True):
        assert a.dtype == p.dtype, name
        ours_error, plain_error = ((value.double() - e).abs().mean() for value in (a, p))
        assert ours_error <= 2 * plain_error, name
