"""Block ops over flat arguments, of which those with adapters become one weight."""

from memkernels import ops

MLP, ATTENTION = ("w_gate", "w_up", "w_down"), ("w_q", "w_k", "w_v", "w_o")


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
