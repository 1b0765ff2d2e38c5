"""torch.compile: that what it makes of an op equals eager, and by which backends what takes long to compile is tested:
whole models, blocks, and layers with adapters.
"""

import pytest
import torch

# "aot_eager" traces and derives, which is what depends on this package, and generates no code, which takes a minute.
on_every_compiler = pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])


def check_compiled(function, inputs, *, rtol=None, atol=None, **options):
    """function(**inputs), and the gradients of it, or of its squares' sum where it is no scalar, are the same compiled
    whole, with torch.compile's options."""
    wanted = [tensor for tensor in inputs.values() if tensor is not None and tensor.requires_grad]
    torch.compiler.reset()  # shapes of tests before would make those of this one dynamic
    results = []
    for run in (function, torch.compile(function, fullgraph=True, **options)):
        y = run(**inputs)
        results.append([y, *torch.autograd.grad(y.float().square().sum() if y.dim() else y, wanted)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=rtol, atol=atol)
