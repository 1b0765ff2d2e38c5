"""Block ops over flat arguments, of which those with adapters become one weight."""

from memkernels import ops
from memkernels.testing import random_tensor

MLP, ATTENTION = ("w_gate", "w_up", "w_down"), ("w_q", "w_k", "w_v", "w_o")
D, F_SIZE, HEADS, SIZE, RANK = 24, 40, 4, 8, 3
OUT_IN = {"w_gate": (F_SIZE, D), "w_up": (F_SIZE, D), "w_down": (D, F_SIZE), "w_q": (HEADS * SIZE, D),
          "w_k": (2 * SIZE, D), "w_v": (2 * SIZE, D), "w_o": (D, HEADS * SIZE)}  # fmt: skip


def make_inputs(shape, names, dtype, *, magnitude=False, adapter=None, plain=(), draw=0):
    """x, a norm's weight, and of each weight the base, frozen, with adapter and bias; no adapter of those in `plain`.

    q and k have no bias: without rotation the gradient of k's is zero but for rounding, and q's is attention's error.
    """
    adapter, seed = adapter or dtype, 1000 * draw
    inputs = {
        "x": random_tensor(*shape, D, dtype=dtype, seed=seed),
        "norm_weight": random_tensor(D, dtype=dtype, seed=seed + 1),
    }
    for index, name in enumerate(names):
        out, size = OUT_IN[name]
        parts = {"": (out, size)}
        parts |= {} if name in plain else {".a": (RANK, size), ".b": (out, RANK)}
        parts |= {".magnitude": (out,)} if magnitude and name not in plain else {}
        for part, of in parts.items():
            narrow = adapter if part in (".a", ".b") else dtype
            inputs[name + part] = random_tensor(
                *of, dtype=narrow, seed=seed + 10 * index + len(part) + 2, scale=of[-1] ** -0.5
            )
        inputs[name].requires_grad_(name in plain)
        if name in ("w_q", "w_k"):
            continue
        inputs[f"b{name[1:]}"] = random_tensor(out, dtype=dtype, seed=seed + 10 * index + 9)
    return inputs


def assembled(tensors, dropout_p):
    """The arguments of a block: adapted weights in the place of weights."""
    arguments = {name: tensor for name, tensor in tensors.items() if "." not in name}
    for index, name in enumerate(sorted(MLP + ATTENTION)):
        if f"{name}.a" in tensors:
            arguments[name] = ops.LoRAWeight(
                tensors[name], tensors[f"{name}.a"], tensors[f"{name}.b"], 0.7, dropout_p, 100 + index,
                tensors.get(f"{name}.magnitude"),
            )  # fmt: skip
    return arguments


def over_flat(function, dropout_p=0.0, **options):
    return lambda **tensors: function(**assembled(tensors, dropout_p), **options)


def layer(function, dropout_p, attention, **mlp):
    """A decoder layer over flat arguments, with one norm weight for both norms and options of each sublayer."""

    def call(x, norm_weight, **tensors):
        given = assembled(tensors, dropout_p)

        def of(names):
            return {name: given[name] for weight in names for name in (weight, f"b{weight[1:]}") if name in given}

        return function(
            x, of(ATTENTION) | {"norm_weight": norm_weight} | attention,
            of(MLP) | {"norm_weight": norm_weight * 1.0} | mlp,
        )  # fmt: skip

    return call
