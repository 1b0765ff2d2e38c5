"""Parameters of several shapes, and steps with the same gradients for every optimizer; options of AdamW."""

import torch

from memkernels.optim import rounding

SHAPES = ((300, 7), (), (1,), (0,), (255,), (256,), (3, 5, 67), (6000,))
OPTIONS = {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def normal(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameters(dtype=torch.float32, shapes=SHAPES):
    return [torch.nn.Parameter(normal(shape, i, dtype)) for i, shape in enumerate(shapes)]


def set_gradients(params, step):
    """The same at a step for every optimizer, of a size that varies over elements, rounded to bfloat16."""
    for i, param in enumerate(params):
        scale = 10 ** normal(param.shape, 1000 + i)
        param.grad = (scale * normal(param.shape, 2000 + 100 * step + i)).bfloat16().to(param.dtype)


def train(optimizer, params, steps=20, first=0):
    for step in range(first, first + steps):
        set_gradients(params, step)
        optimizer.step()


def master(optimizer, param):
    """A copy of a parameter with all the bits there are of it."""
    state = optimizer.state[param]
    return rounding.join(param.detach(), state["remainder"]) if "remainder" in state else param.detach().clone()
