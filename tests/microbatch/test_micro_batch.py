"""micro_batch: the gradients of the whole batch, through running out of memory, and over ranks."""

import os
import time
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_ranks
from torch.utils.checkpoint import checkpoint

from memkernels import micro_batch
from memkernels.microbatch import run
from memkernels.microbatch.search import Fitting
from memkernels.optim import SGD, RankFailure, step_in_backward


def batch_of(rows=7, seed=0):
    """Rows with as many targets as their index, so that means of parts are not the mean of the whole."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (rows, 8), generator=generator)
    for row in range(rows):
        labels[row, : 8 - row % 8] = -100
    return {
        "x": torch.randn(rows, 8, 6, generator=generator),
        "labels": labels,
        "scale": 2.0,
        "shift": torch.tensor(0.5),
    }


def model_of():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 5))


def make_step(model, sizes=None):
    def step(part, targets):
        if sizes is not None:
            sizes.append(len(part["labels"]))
        logits = model(part["x"] * part["scale"] + part["shift"])
        return F.cross_entropy(logits.flatten(0, -2), part["labels"].flatten(), reduction="sum") / targets

    return step


def whole(model, batch):
    logits = model(batch["x"] * batch["scale"] + batch["shift"])
    loss = F.cross_entropy(logits.flatten(0, -2), batch["labels"].flatten())
    loss.backward()
    return loss.detach()


def assert_same_gradients(model, other):
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100, "auto"])
def test_gradients_and_loss_are_those_of_the_whole_batch(size):
    model, other, sizes = model_of(), model_of(), []
    for seed in range(2):  # the second adds to the first
        loss = micro_batch(make_step(model, sizes), batch_of(seed=seed), size=size)
        torch.testing.assert_close(loss, whole(other, batch_of(seed=seed)))
    assert_same_gradients(model, other)
    assert sum(sizes) == 14 and (size in ("auto", 7, 100) or max(sizes) == size)


def test_targets_can_be_counted_by_the_caller():
    model, seen = model_of(), []

    def step(part, targets):
        seen.append(targets)
        return model(part[0]).sum() / targets

    micro_batch(step, (torch.ones(4, 6), ["of", "no", "tensor"]), size=3)
    micro_batch(step, [torch.ones(4, 6)], size=4, targets=lambda batch: 10)
    assert seen == [4.0, 4.0, 10.0]


class Failing(torch.autograd.Function):
    """Fails in backward, when other parameters have their gradients already, for more than `limit` rows."""

    @staticmethod
    def forward(ctx, x, limit, error):
        ctx.limit, ctx.error = limit, error
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        if len(dy) > ctx.limit:
            raise ctx.error
        return dy, None, None


def failing_step(model, limit, error, sizes=None):
    def step(part, targets):
        if sizes is not None:
            sizes.append(len(part["labels"]))
        hidden = Failing.apply(model[0](part["x"] * part["scale"] + part["shift"]), limit, error)
        logits = model[2](model[1](hidden))
        return F.cross_entropy(logits.flatten(0, -2), part["labels"].flatten(), reduction="sum") / targets

    return step


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 1"
    ),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_running_out_of_memory_halves_the_parts_and_is_remembered(error):
    model, other, sizes = model_of(), model_of(), []
    step = failing_step(model, 2, error, sizes)
    micro_batch(step, batch_of(rows=9, seed=1))
    assert sizes == [9, 5, 3, 2, 2, 2, 2, 1]
    loss = micro_batch(step, batch_of(rows=9, seed=2))
    assert sizes[8:] == [2, 2, 2, 2, 1]
    whole(other, batch_of(rows=9, seed=1))
    torch.testing.assert_close(loss, whole(other, batch_of(rows=9, seed=2)))
    assert_same_gradients(model, other)
    # Rows of another kind are tried anew.
    wide = batch_of(rows=3) | {"more": torch.zeros(3, 2)}
    micro_batch(step, wide)
    assert sizes[13:] == [3, 2, 1]


@pytest.mark.parametrize(
    ("limit", "error", "expected"),
    [(0, MemoryError("full"), MemoryError), (100, None, None), (3, ValueError("a bug"), ValueError)],
)
def test_gradients_from_before_outlive_a_failure(limit, error, expected):
    model = model_of()
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    held = [param.grad for param in model.parameters()]
    if expected is None:
        micro_batch(failing_step(model, limit, error), batch_of())
        assert all(
            param.grad is grad and not (grad == 1).all() for param, grad in zip(model.parameters(), held, strict=True)
        )
        return
    with pytest.raises(expected, match=str(error)):
        micro_batch(failing_step(model, limit, error), batch_of(rows=5))
    assert all(param.grad is grad and (grad == 1).all() for param, grad in zip(model.parameters(), held, strict=True))


def test_a_stated_budget(monkeypatch):
    """Parts that take a megabyte a row, in a budget of three and a half."""
    monkeypatch.setattr(run, "peak_bytes", lambda part, device: (part(), len(sizes[-1:]) and sizes[-1] << 20)[1])
    model, other, sizes = model_of(), model_of(), []
    step = make_step(model, sizes)
    for _ in range(2):
        micro_batch(step, batch_of(rows=8), memory_limit=7 << 19)
        whole(other, batch_of(rows=8))
    assert sizes == [8, 4, 2, 2, 2, 2, 3, 3, 2]
    assert_same_gradients(model, other)
    with pytest.raises(MemoryError, match="memory_limit: a part took 1048576 bytes, of 1000"):
        micro_batch(step, batch_of(rows=8), memory_limit=1000)  # another limit is tried anew


def test_steps_in_backward_are_refused_but_within_accumulate():
    """They would step after each part."""
    model, other = model_of(), model_of()
    stepper = step_in_backward(model, SGD, lr=1.0)
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(ValueError, match=r"call micro_batch within accumulate\(\)"):
        micro_batch(make_step(model), batch_of(), size=2)
    assert all(torch.equal(param, value) for param, value in zip(model.parameters(), before, strict=True))
    with stepper.accumulate():
        micro_batch(make_step(model), batch_of(), size=2)
    whole(other, batch_of())
    assert_same_gradients(model, other)


class Pair(NamedTuple):
    x: torch.Tensor
    labels: torch.Tensor


def test_a_named_tuple_is_cut_into_named_tuples():
    model, other, batch = model_of(), model_of(), batch_of()

    def step(part, targets):
        return make_step(model)(batch | part._asdict(), targets)

    pair = Pair(batch["x"], batch["labels"])
    micro_batch(step, pair, size=2, targets=lambda pair: int((pair.labels != -100).sum()))
    whole(other, batch)
    assert_same_gradients(model, other)


def test_the_fewest_parts_that_fit_are_found_and_remembered():
    model, other, sizes = model_of(), model_of(), []
    limits = [24]

    def step(part, targets):
        return failing_step(model, limits[0], MemoryError("full"), sizes)(part, targets)

    for expected in ([64, 32, 16, 16, 16, 16], [22, 22, 20], [22, 22, 20]):
        micro_batch(step, batch_of(rows=64))
        whole(other, batch_of(rows=64))
        assert sizes == expected
        sizes.clear()
    assert_same_gradients(model, other)
    limits[0] = 8  # what fitted does no longer
    for expected in ([22, 11, *[6] * 10, 4], [8] * 8, [10, *[8] * 8], [8] * 8):
        micro_batch(step, batch_of(rows=64))
        assert sizes == expected
        sizes.clear()


@pytest.mark.parametrize("count", [1, 2, 9, 64, 100, 1000])
def test_the_search_ends_at_the_fewest_parts(count):
    """By one part that does not fit for each halving of the count at most."""
    for limit in range(1, count + 1):
        found, failures = Fitting(), 0
        for _ in range(12):
            size = found.size(count)
            while size > limit:
                found.failed(size)
                failures += 1
                size = found.size_after_failure(count)
            found.ran(size)
        assert -(-count // size) == -(-count // limit), (limit, size)
        assert failures <= count.bit_length()


def test_a_small_batch_does_not_cap_a_larger_one():
    sizes = []
    step = make_step(model_of(), sizes)
    for rows in (2, 7, 5):
        micro_batch(step, batch_of(rows=rows))
    assert sizes == [2, 7, 5]


def test_a_method_is_remembered():
    class Trainer:
        def __init__(self):
            self.sizes = []
            self.inner = failing_step(model_of(), 2, MemoryError(), self.sizes)

        def step(self, part, targets):
            return self.inner(part, targets)

    trainer = Trainer()
    for _ in range(2):
        micro_batch(trainer.step, batch_of(rows=4))
    assert trainer.sizes == [4, 2, 2, 2, 2]


def test_a_reentrant_checkpoint_is_refused():
    """Its parameters are not in the graph, so that a part that begins anew would count twice."""
    model = model_of()

    def step(part, targets, reentrant=True):
        hidden = checkpoint(model, part["x"].requires_grad_(), use_reentrant=reentrant)
        return hidden.sum() / targets

    with pytest.raises(ValueError, match="use_reentrant=False"):
        micro_batch(step, batch_of())
    assert all(param.grad is None for param in model.parameters())
    micro_batch(lambda part, targets: step(part, targets, False), batch_of())


def packed_batch():
    lengths = [3, 9, 1, 4, 6]
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(23, 6, generator=generator), torch.randint(0, 5, (23,), generator=generator)
    labels[:7] = -100
    return {"x": x, "labels": labels, "cu_seqlens": starts, "scale": 1.0, "shift": 0.0}


def test_packed_sequences_stay_whole():
    model, other, seen = model_of(), model_of(), []

    def step(part, targets):
        starts = part["cu_seqlens"]
        seen.append(starts.diff().tolist())
        assert starts[0] == 0 and starts[-1] == len(part["x"]) == len(part["labels"])
        return make_step(model)(part, targets)

    loss = micro_batch(step, packed_batch(), size=8)
    assert seen == [[3], [9], [1, 4], [6]]
    torch.testing.assert_close(loss, whole(other, packed_batch()))
    assert_same_gradients(model, other)


def test_a_sequence_that_does_not_fit_is_not_tried_again_and_again():
    tried = []

    def step(part, targets):
        tried.append(part["cu_seqlens"].diff().tolist())
        return failing_step(model_of(), 5, MemoryError("full"))(part, targets)

    with pytest.raises(MemoryError, match="full"):
        micro_batch(step, packed_batch())
    # Of 23 tokens, 12, 6, then 3: below 5, the shortest two sequences together, all are single.
    assert tried == [[3, 9, 1, 4, 6], [3, 9], [3], [9], [3], [9]]
    tried.clear()
    with pytest.raises(MemoryError, match="full"):
        micro_batch(step, {"x": torch.ones(9, 6), "labels": torch.ones(9).long(), "cu_seqlens": torch.tensor([0, 9]),
                           "scale": 1.0, "shift": 0.0})  # fmt: skip
    assert tried == [[9]]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"size": 0}, ValueError, 'size: expected "auto" or a positive integer, got 0'),
        ({"size": 2.5}, ValueError, "size: expected"),
        ({"memory_limit": 0}, ValueError, "memory_limit: expected a positive number"),
        ({"memory_limit": "1GB"}, TypeError, "memory_limit: expected a positive number of bytes, got '1GB'"),
        ({"targets": 3}, TypeError, "targets: expected a function, got int"),
        ({"step": 3}, TypeError, "step: expected a function, got int"),
        ({"step": lambda part, targets: part["x"].sum()}, ValueError, "step: expected a loss that requires a gradient"),
        ({"step": lambda part, targets: None}, TypeError, "step: expected a loss, got NoneType"),
        ({"batch": {}}, ValueError, "batch: expected tensors of one row at least"),
        ({"batch": {"x": torch.ones(0, 6)}}, ValueError, "batch: expected tensors of one row at least"),
        (
            {"batch": {"x": torch.ones(4, 6), "y": [torch.ones(3)]}},
            ValueError,
            r"batch\['y'\]\[0\]: expected 4 along the leading dimension, as the others, got 3",
        ),
        ({"batch": {"labels": torch.full((4, 2), -100)}}, ValueError, "batch: expected one target at least, got 0"),
        ({"batch": {"cu_seqlens": torch.tensor([0, 3, 3])}}, ValueError, "expected ascending starts"),
        ({"batch": {"cu_seqlens": [0, 3]}}, ValueError, r"batch\['cu_seqlens'\]: expected a tensor of integers"),
        ({"step": lambda part, targets: part["x"].sum(1)}, ValueError, "step: expected a loss without dimensions"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    arguments = {"batch": batch_of(), "step": make_step(model_of())} | arguments
    with pytest.raises(error, match=message):
        micro_batch(arguments.pop("step"), arguments.pop("batch"), **arguments)


def agree(folder):
    rank, group = dist.get_rank(), dist.group.WORLD
    model, sizes = model_of(), []
    batches = [batch_of(rows=4, seed=1), batch_of(rows=7, seed=2)]
    step = failing_step(model, 2 if rank == 0 else 100, MemoryError("full"), sizes)
    for _ in range(2):
        micro_batch(step, batches[rank], process_group=group)
    # Seven rows a part, then four, then two; the second call tries three, and knows two.
    assert sizes == [[4, 4, 2, 2, 3, 2, 2], [7, 4, 2, 2, 2, 1, 3, 2, 2, 2, 1]][rank]
    other = model_of()
    logits = [other(b["x"] * b["scale"] + b["shift"]).flatten(0, -2) for b in batches]
    F.cross_entropy(torch.cat(logits), torch.cat([b["labels"].flatten() for b in batches])).backward()
    for param, exact in zip(model.parameters(), other.parameters(), strict=True):
        dist.all_reduce(param.grad)
        torch.testing.assert_close(param.grad / 2 / 2, exact.grad, rtol=1e-5, atol=1e-7)
    fails = failing_step(model, 0 if rank == 1 else 100, ValueError("a bug"))
    for attempt, own in (
        ((fails, batches[rank]), "a bug"),
        ((step, {} if rank == 1 else batches[0]), "batch: expected tensors"),
    ):
        error, message = (ValueError, own) if rank == 1 else (RuntimeError, "micro_batch: another rank failed")
        with pytest.raises(error, match=message):
            micro_batch(*attempt, process_group=group)
    step, started = make_step(model), time.monotonic()
    with pytest.raises(RankFailure, match="one of them has ended"):
        micro_batch(lambda *part: os._exit(0) if rank else step(*part), batches[0], process_group=group)
    assert time.monotonic() - started < 60
    (folder / "all").touch()
    os._exit(0)


def test_ranks_agree(tmp_path):
    """Of four and seven rows, memory for two on one rank alone; one rank that fails, in its step or before it; and one
    that dies."""
    run_ranks(agree, 2, tmp_path, tmp_path)
    assert (tmp_path / "all").exists()


def test_a_row_that_did_not_fit_is_tried_again():
    """As memory may be there by then."""
    limits, model, other = [0, 100], model_of(), model_of()

    def step(part, targets):
        return failing_step(model, limits[0], MemoryError("full"))(part, targets)

    with pytest.raises(MemoryError, match="full"):
        micro_batch(step, batch_of(rows=3))
    limits.pop(0)
    torch.testing.assert_close(micro_batch(step, batch_of(rows=3)), whole(other, batch_of(rows=3)))
    assert_same_gradients(model, other)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_a_stated_size_that_does_not_fit_raises_what_came(error):
    with pytest.raises(type(error)) as caught:
        micro_batch(failing_step(model_of(), 2, error), batch_of(), size=3)
    assert caught.value is error
