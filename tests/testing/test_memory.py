"""saved_bytes counts everything that stays alive for backward, and nothing else."""

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from memkernels.testing import saved_bytes

SIZE = 1000 * 4


class Holds(torch.autograd.Function):
    """Twice x; keeps one tensor where autograd sees it and one where it does not."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x + 1)
        ctx.hidden = x + 2
        return x * 2

    @staticmethod
    def backward(ctx, dy):
        return dy * 2


def test_what_autograd_saves_counts_once():
    x = torch.ones(1000, requires_grad=True)
    assert saved_bytes(lambda: (x * x).sum()) == SIZE
    assert saved_bytes(lambda: (x * x).sum(), exclude=(x,)) == 0
    assert saved_bytes(lambda: x.exp(), exclude=(x,)) == SIZE  # its own result


def test_a_result_that_is_not_saved_does_not_count():
    x = torch.ones(1000, requires_grad=True)
    assert saved_bytes(lambda: {"y": x + 1}, exclude=(x,)) == 0


def test_what_a_function_keeps_past_autograd_counts():
    x = torch.ones(1000, requires_grad=True)
    assert saved_bytes(lambda: Holds.apply(x), exclude=(x,)) == 2 * SIZE


def test_what_selective_checkpointing_keeps_counts():
    x = torch.ones(1000, requires_grad=True)
    contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten.sin.default])
    options = {"use_reentrant": False, "preserve_rng_state": False}

    def run(**more):
        return checkpoint(lambda x: x.sin().exp().cos().sum(), x, **options, **more)

    assert saved_bytes(run, exclude=(x,)) == 0
    assert saved_bytes(partial(run, context_fn=contexts), exclude=(x,)) == SIZE
