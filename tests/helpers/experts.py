"""The experts' layer by its definition, and inputs for it."""

from __future__ import annotations

import torch

from memkernels import ops
from memkernels.ops.gated_activation.reference import gated_activation
from memkernels.quant import QuantizedTensor
from memkernels.testing import random_tensor

SCALING = 0.7


def random_ids(tokens: int, choices: int, experts: int, *, nowhere: bool = False, seed: int = 0) -> torch.Tensor:
    """(T, k), distinct in a row; with `nowhere` some are num_experts."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :choices]
    if nowhere:
        ids[torch.rand(ids.shape, generator=generator) < 0.2] = experts
    return ids


def chosen_by_experts(experts, tokens, capacity, device="cpu", seed=0):
    """The plan of random choices, of which the first of each expert is nobody."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(experts, tokens, generator=generator).argsort(1)[:, :capacity]
    chosen[:, 0] = tokens
    return ops.expert_choice_plan(chosen.to(device), tokens)[0]


def loop_over_tokens(
    x, expert_ids, expert_weights, w_gate_up, w_down, *, activation="silu", capacity=None, kept=None, **adapters
):
    """The layer by its definition, one token and one choice at a time; kept (T, k, n), the factors of a dropout."""
    weights = {
        name: w.dequantize() if isinstance(w, QuantizedTensor) else w
        for name, w in (("w_gate_up", w_gate_up), ("w_down", w_down))
    }

    def product(name, expert, row):
        y = weights[name][expert] @ row
        if f"{name}.a" not in adapters:
            return y
        a, b = (adapters[f"{name}.{factor}"][expert] for factor in "ab")
        return (y + SCALING * (b @ (a @ row.to(a.dtype)))).to(y.dtype)

    experts, _, n = w_down.shape
    taken = [0] * experts
    rows = []
    for token, ids in enumerate(expert_ids.tolist()):
        row = torch.zeros_like(x[token], dtype=torch.promote_types(x.dtype, torch.float32))
        for choice, expert in enumerate(ids):
            if expert == experts or (capacity is not None and taken[expert] >= capacity):
                continue
            taken[expert] += 1
            hidden = product("w_gate_up", expert, x[token])
            gate, up = (hidden, None) if hidden.shape[0] == n else (hidden[:n], hidden[n:])
            h = gated_activation(gate, up, activation)
            y = product("w_down", expert, h if kept is None else h * kept[token, choice].to(h.dtype))
            row = row + expert_weights[token, choice] * y
        rows.append(row.to(x.dtype))
    return torch.stack(rows)


def over_flat(function, **options):
    """Of a layer whose weights come with their adapters' factors beside them, "w_down.a" and "w_down.b"."""

    def call(w_gate_up, w_down, **tensors):
        weights = {"w_gate_up": w_gate_up, "w_down": w_down}
        for name, weight in weights.items():
            if f"{name}.a" in tensors:
                a, b = (tensors.pop(f"{name}.{factor}") for factor in "ab")
                weights[name] = ops.ExpertsLoRAWeight(weight, a, b, SCALING)
        return function(**tensors, **weights, **options)

    return call


def adapter_inputs(inputs, rank, dtype):
    """Factors for both weights of a layer's inputs."""
    return inputs | {
        f"{name}.{factor}": random_tensor(*shape, dtype=dtype, seed=seed, scale=shape[-1] ** -0.5)
        for seed, name in ((5, "w_gate_up"), (7, "w_down"))
        for experts, out, size in (inputs[name].shape,)
        for seed, factor, shape in ((seed, "a", (experts, rank, size)), (seed + 1, "b", (experts, out, rank)))
    }


def layer_inputs(tokens, choices, experts, d, n, dtype, *, gated=True, weights_dtype=torch.float32, **ids):
    return {
        "x": random_tensor(tokens, d, dtype=dtype, seed=1),
        "expert_ids": random_ids(tokens, choices, experts, **ids),
        "expert_weights": random_tensor(tokens, choices, dtype=weights_dtype, seed=2, scale=0.5),
        "w_gate_up": random_tensor(experts, (2 if gated else 1) * n, d, dtype=dtype, seed=3, scale=d**-0.5),
        "w_down": random_tensor(experts, d, n, dtype=dtype, seed=4, scale=n**-0.5),
    }
