"""Inputs of ops.attention."""

import torch

from memkernels.testing import random_tensor


def make_inputs(
    dtype, device, *, batch=2, queries=63, keys=63, heads=4, kv_heads=2, size=60, value_size=None, packed=False
):
    lead = () if packed else (batch,)
    shapes = {
        "q": (*lead, queries, heads, size),
        "k": (*lead, keys, kv_heads, size),
        "v": (*lead, keys, kv_heads, value_size or size),
    }
    return {n: random_tensor(*s, dtype=dtype, device=device, seed=i) for i, (n, s) in enumerate(shapes.items())}


def make_slopes(*shape, device):
    """Positive, as ALiBi's are: negative ones make large scores, and lse rounds more than what a softmax subtracts."""
    return random_tensor(*shape, dtype=torch.float32, device=device).detach().abs()


def starts(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)
