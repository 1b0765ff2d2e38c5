"""What the tests of both norms share."""

import torch

from memkernels.testing import check_op, random_tensor


def check_under_autocast(norm, reference, with_residual, device, parameters):
    """float32 parameters between two products of bfloat16; what is float32 stays float32."""

    def block(norm):
        def run(x, w_in, w_out, **parameters):
            with torch.autocast(x.device.type, torch.bfloat16):
                hidden = torch.nn.functional.linear(x, w_in)
                y = norm(hidden, **parameters)
                assert y.dtype == hidden.dtype
                return torch.nn.functional.linear(y, w_out)

        return run

    shapes = {"x": (9, 24), "w_in": (33, 24), "w_out": (16, 33)} | dict.fromkeys(parameters, (33,))
    inputs = {
        name: random_tensor(
            *shape, dtype=torch.float32, device=device, seed=seed,
            scale=shape[1] ** -0.5 if name.startswith("w_") else 1.0,
        )
        for seed, (name, shape) in enumerate(shapes.items(), 1)
    }  # fmt: skip
    check_op(block(norm), block(reference), inputs)
    with torch.autocast(device, torch.bfloat16):
        inside = norm(**with_residual)
    assert all(map(torch.equal, inside, norm(**with_residual)))
