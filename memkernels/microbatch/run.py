"""Forward and backward of a batch by parts, and the search for the size of a part that fits into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from memkernels.microbatch import parts
from memkernels.microbatch.search import Fitting, known
from memkernels.ops.checks import check_number
from memkernels.optim.agreement import RankFailure, check_member, device_of, is_out_of_memory, leave, start, wait_for
from memkernels.testing.peak_memory import peak_bytes

if TYPE_CHECKING:
    from memkernels.optim.sharded import ShardedOptimizer

Step = Callable[[Any, float], Tensor]
_T = TypeVar("_T")


_RIGHT, _OUT_OF_MEMORY, _FAILED = range(3)


def micro_batch(
    step: Step,
    batch: Any,
    *,
    size: int | Literal["auto"] = "auto",
    targets: Callable[[Any], int] | None = None,
    memory_limit: int | None = None,
    process_group: dist.ProcessGroup | None = None,
    optimizer: ShardedOptimizer | None = None,
) -> Tensor:
    """Forward and backward of `batch` by parts: the gradients of the whole, the activations of a part at a time.

        def step(part, targets):
            return model(**part, num_items_in_batch=targets).loss  # a sum over the part's targets / targets

        loss = memkernels.micro_batch(step, batch)
        optimizer.step()

    Parts do not have the same number of targets, so the mean of their means is not the mean of the whole. `step`
    divides its sum by the number of the whole batch instead, and the parts' losses and gradients add up to those of the
    batch.

    With size="auto" the whole batch is tried first, and half of the size wherever memory runs out: on a GPU, in torch's
    allocator on CPU, or over `memory_limit`. The gradients of the parts that ran are dropped then and the batch begins
    anew, so that no row is lost and none counts twice; gradients from before the call are kept aside meanwhile. What
    ran and what did not fit is remembered for `step` (give the same function or method each time), the limit, and
    batches whose rows are alike. Calls that follow try sizes in between, by bisection, until a batch has the fewest
    parts that fit: one of 64 rows with memory for 24 is tried in parts of 64 and 32 and runs in parts of 16, and the
    next one in parts of 22. A size that fitted and does so no longer is halved again; one that did not fit is not tried
    again.

    With `optim.step_in_backward` call it within `stepper.accumulate()`, and then `stepper.optimizer.step()` and
    `zero_grad()`: its hooks would step after each part. Checkpoint activations with `use_reentrant=False`.

    With a process group all ranks take the same size and the same number of parts, and if one runs out of memory, all
    begin anew; if one fails otherwise, all raise. `step` must then not communicate itself: reduce the gradients after
    the call (DistributedDataParallel: within `no_sync`). The number of targets is the mean over the ranks, so that
    gradients averaged over ranks are those of all their batches together.

    With a `ShardedOptimizer`, which exchanges gradients within backward, pass it as `optimizer`, outside of its
    `no_sync` (of several of one model, as with Muon, any at stage 3; at stages 1 and 2 they are refused, and the parts
    run in a loop of your own): every rank runs as many parts, with a loss of zero where its own are fewer, and what was
    exchanged before memory ran out is dropped from the optimizer's sums. At stages 1 and 2 a rank whose part fails, be
    it for memory of the exchange itself, still takes part in its exchange, in memory that was set aside before. For a
    bucket larger than `bucket_bytes`, and at stage 3, it cannot, and so the ranks exchange one number before each
    exchange of these, by which the others hear of it. Memory that runs out within an exchange itself, where a rank may
    have sent its half, ends the call: every rank raises RankFailure, over gloo at once, since that rank closes its
    connections, over NCCL when its process ends or after the group's timeout.

    Args:
        step: takes a part and the number of targets, returns a loss without dimensions.
        batch: a tensor, or mappings, tuples and lists of them. Tensors are cut along their leading dimension; those
            without dimensions, and what is no tensor, go to every part. A mapping with "cu_seqlens" holds packed
            sequences: `size` counts tokens, and parts are whole sequences, their cu_seqlens from 0 on.
        size: rows of a part, or at most so many tokens (but one sequence at least); or "auto".
        targets: the number of targets of `batch`; by default entries of batch["labels"] other than -100, without labels
            rows. Models that shift labels take none from a row's first: give
            `lambda batch: int((batch["labels"][:, 1:] != -100).sum())`.
        memory_limit: bytes that a part may take beyond what is in use before it, gradients included where they are new;
            measured (`memkernels.testing.peak_bytes`) on the device of the batch until a size is known to fit.
        process_group: ranks that run this call together; by default those of `optimizer`, without one this process.
        optimizer: the `ShardedOptimizer` of the parameters, if they have one.

    Returns:
        The sum of the parts' losses, detached; of this rank alone.

    Raises:
        TypeError: step or targets is no function, a loss no tensor, memory_limit no number, optimizer no
            `ShardedOptimizer`.
        ValueError: the batch is empty, its tensors differ in their leading dimension, it has no targets, `size` or
            `memory_limit` is not positive, the ranks have different sizes, a loss has dimensions, a checkpoint is
            reentrant, process_group is not the optimizer's or this rank not in it, the parameters have a
            `ShardedOptimizer` that was not given, `step_in_backward` outside of its `accumulate()`, or
            `offload_gradients`.
        RuntimeError: another rank failed, or an optimizer's `no_sync()` is around the call.
        RankFailure: another rank has ended, or did not answer within the group's timeout (`memkernels.optim`).
        torch.OutOfMemoryError, MemoryError or RuntimeError, as it came: a single row or sequence does not fit.
            Gradients are then those from before the call, as after any other error; those that `no_sync` left on the
            ranks, where memory runs out while they are exchanged, are dropped.
    """
    listening = _listening(process_group, optimizer)
    try:
        if process_group is None:
            process_group = listening
        if process_group is not None:
            check_member(process_group)
        _check(step, size, targets, memory_limit, process_group, optimizer)
        cut = parts.split(batch)
        total = float(parts.count_targets(batch, cut.count) if targets is None else targets(batch))
    except Exception:
        if listening is not None:
            _reduced(True, dist.ReduceOp.MAX, listening)
        raise
    found = known(step, (memory_limit, *parts.signature(batch)))
    agreed, count, least = Fitting(found.fits, found.fails), cut.count, cut.least
    if process_group is not None:
        if _reduced(False, dist.ReduceOp.MAX, process_group):
            raise RuntimeError("micro_batch: another rank failed.")
        rows = 0 if size == "auto" else size
        if _reduced(rows, dist.ReduceOp.MAX, process_group) != _reduced(rows, dist.ReduceOp.MIN, process_group):
            raise ValueError(f"size: expected the same on every rank, which {size!r} is not.")
        total = _reduced(total, dist.ReduceOp.SUM, process_group) / dist.get_world_size(process_group)
        count = int(_reduced(count, dist.ReduceOp.MAX, process_group))
        least = int(_reduced(least, dist.ReduceOp.MIN, process_group))
        agreed.fits = int(_reduced(found.fits, dist.ReduceOp.MIN, process_group))
        agreed.fails = _reduced(found.fails, dist.ReduceOp.MIN, process_group)
    if not total > 0:
        raise ValueError(f"batch: expected one target at least, got {total}.")
    run = _Run(step, cut, total, process_group, optimizer)
    if size != "auto":
        try:
            return run.at(size, memory_limit)
        except _TooLarge as too_large:
            raise too_large.error from None
    tried = agreed.size(count)
    while True:
        try:
            loss = run.at(tried, None if tried <= agreed.fits else memory_limit)
        except _TooLarge as too_large:
            if tried <= least:
                raise too_large.error from None
        else:
            found.ran(tried)
            return loss
        # Out of the handler, so that nothing keeps the failed part's tensors alive.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        for record in (agreed, found):
            record.failed(tried)
        tried = agreed.size_after_failure(count)


def _listening(*candidates: Any) -> dist.ProcessGroup | None:
    """The ranks that are to hear of an error of this one: of a process group, or else of an optimizer's."""
    groups = (getattr(of, "process_group", of) for of in candidates)
    return next((of for of in groups if isinstance(of, dist.ProcessGroup) and dist.get_rank(of) >= 0), None)


def _check(
    step: Step,
    size: int | str,
    targets: Callable[[Any], int] | None,
    memory_limit: int | None,
    process_group: dist.ProcessGroup | None,
    optimizer: ShardedOptimizer | None,
) -> None:
    for name, function in (("step", step), ("targets", targets)):
        if not callable(function) and (name, function) != ("targets", None):
            raise TypeError(f"{name}: expected a function, got {type(function).__name__}.")
    if size != "auto" and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ValueError(f'size: expected "auto" or a positive integer, got {size!r}.')
    if memory_limit is not None:
        check_number("memory_limit", memory_limit, "a positive number of bytes", lambda number: number > 0)
    if optimizer is None:
        return
    from memkernels.optim.sharded import ShardedOptimizer  # takes seconds to import

    if not isinstance(optimizer, ShardedOptimizer):
        raise TypeError(f"optimizer: expected a ShardedOptimizer, got {type(optimizer).__name__}.")
    if dist.get_process_group_ranks(process_group) != dist.get_process_group_ranks(optimizer.process_group):
        raise ValueError("process_group: expected the optimizer's, or None.")


class _TooLarge(Exception):
    """Memory ran out, on this rank or on another."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error.with_traceback(None)


class _Heard(Exception):
    """Another rank will not come to an exchange, as all have agreed before it; `outcome` is what every rank raises."""

    def __init__(self, outcome: Exception) -> None:
        super().__init__(str(outcome))
        self.outcome = outcome


class _Run:
    """A batch's parts, run at one size or another."""

    def __init__(
        self,
        step: Step,
        cut: parts.Rows | parts.PackedSequences,
        total: float,
        group: dist.ProcessGroup | None,
        optimizer: ShardedOptimizer | None,
    ) -> None:
        self.step, self.cut, self.total, self.group, self.optimizer = step, cut, total, group, optimizer

    def at(self, size: int, memory_limit: int | None) -> Tensor:
        """The loss of the batch in parts of `size`; the gradients from before where that fails."""
        before: dict[Tensor, Tensor | None] = {}
        losses: list[Tensor] = []
        pieces = list(self.cut.parts(size))
        rounds = len(pieces)
        if self.group is not None:
            rounds = int(_reduced(rounds, dist.ReduceOp.MAX, self.group))
        try:
            with self._unchanged_by_failure():
                for index in range(rounds):
                    error = None
                    if index < len(pieces):
                        error = self._part(pieces[index], before, losses, memory_limit)
                    elif self.optimizer is not None:  # whose exchanges are every rank's
                        error = self._part(pieces[-1], before, [], memory_limit, weight=0.0)
                    self._agree(error)
        except BaseException:
            for param, grad in before.items():
                param.grad = grad
            raise
        for param, grad in before.items():
            if grad is not None:
                param.grad = grad if param.grad is None else grad.add_(param.grad)
        return torch.stack(losses).sum()

    def _unchanged_by_failure(self) -> AbstractContextManager[None]:
        """Within it an error leaves what the optimizer has of gradients as it was."""
        if self.optimizer is None:
            return nullcontext()
        return self.optimizer.unchanged_by_failure(self._listen, self._together)

    def _part(
        self,
        part: Any,
        before: dict[Tensor, Tensor | None],
        losses: list[Tensor],
        memory_limit: int | None,
        weight: float | None = None,
    ) -> Exception | None:
        """Forward and backward of a part, its loss added to `losses`; the error where it fails."""
        optimizer = self.optimizer
        backwards = 0 if optimizer is None else optimizer.backwards

        def forward_backward() -> None:
            loss = self.step(part, self.total)
            if not isinstance(loss, Tensor):
                raise TypeError(f"step: expected a loss, got {type(loss).__name__}.")
            if loss.dim() != 0:
                raise ValueError(f"step: expected a loss without dimensions, got shape {tuple(loss.shape)}.")
            if not loss.requires_grad:
                raise ValueError("step: expected a loss that requires a gradient.")
            for leaf in _leaves(loss, optimizer):
                if leaf not in before and not (optimizer is not None and _is_exchanged(leaf)):
                    before[leaf], leaf.grad = leaf.grad, None
            (loss if weight is None else loss * weight).backward()
            if optimizer is not None and optimizer.backwards == backwards:  # the loss has none of its parameters
                optimizer.end_backward()
            losses.append(loss.detach())

        def limited() -> None:
            if memory_limit is None:
                forward_backward()
                return
            taken = peak_bytes(forward_backward, device=parts.tensors(part)[0].device)
            if taken > memory_limit:
                raise MemoryError(f"memory_limit: a part took {taken} bytes, of {memory_limit}.")

        try:
            limited()
            return None
        except RankFailure:
            if self.group is not None:
                leave(self.group)
            raise
        except Exception as caught:
            error = caught.with_traceback(None)
        if optimizer is not None and optimizer.backwards == backwards:
            try:
                optimizer.abandon_backward(error)
            except _Heard as heard:
                return heard
        return error

    def _together(self, function: Callable[[], _T]) -> _T:
        """function() on every rank; where it fails on one, for memory too, every rank raises."""
        results: list[_T] = []
        error: Exception | None = None
        try:
            results.append(function())
        except Exception as caught:
            error = caught.with_traceback(None)
        try:
            self._agree(error)
        except _TooLarge as too_large:  # whatever the size
            raise too_large.error from None
        return results[0]

    def _agree(self, error: Exception | None) -> None:
        """Raises what a part came to, on this rank or on another."""
        outcome = error.outcome if isinstance(error, _Heard) else self._outcome(error)
        if outcome is not None:
            raise outcome

    def _listen(self, error: Exception | None) -> None:
        """Raises where a rank has failed within its part, this one by `error`; all come to this as often until then."""
        outcome = self._outcome(error)
        if outcome is not None:
            raise _Heard(outcome)

    def _outcome(self, error: Exception | None) -> Exception | None:
        """What all ranks come to where this one has met `error`, or nothing."""
        state = _RIGHT if error is None else _OUT_OF_MEMORY if is_out_of_memory(error) else _FAILED
        worst = state if self.group is None else int(_reduced(state, dist.ReduceOp.MAX, self.group))
        if worst == _FAILED:
            return error if state == _FAILED else RuntimeError("micro_batch: another rank failed.")
        if worst == _OUT_OF_MEMORY:
            return _TooLarge(error or MemoryError("micro_batch: another rank ran out of memory."))
        return None


def _leaves(loss: Tensor, optimizer: ShardedOptimizer | None) -> list[Tensor]:
    """The tensors whose `grad` backward from `loss` adds to, or which `optimizer` exchanges the gradients of."""
    found, seen, stack = [], set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "CheckpointFunctionBackward":
            raise ValueError("step: expected checkpoints with use_reentrant=False; the graph hides others' parameters.")
        others = optimizer is None and type(node).__name__ == "RegisterPostBackwardFunctionBackward"  # FSDP2's
        if hasattr(node, "variable"):
            exchanging = (hook for hook in _hooks(node.variable) if getattr(hook, "exchanging", False))
            others |= any(optimizer is None or not optimizer.exchanges(hook) for hook in exchanging)
        if others:
            raise ValueError(
                "optimizer: expected the ShardedOptimizer of the model, which exchanges all of its gradients within"
                " backward."
            )
        if hasattr(node, "variable"):
            if any(getattr(hook, "steps", False) for hook in _hooks(node.variable)):
                raise ValueError(
                    "step: its parameters have optim.step_in_backward, which steps after each part: call micro_batch"
                    " within accumulate() of what that returned."
                )
            if any(getattr(hook, "offloads", False) for hook in _hooks(node.variable)):
                raise ValueError(
                    "step: its parameters have optim.offload_gradients, whose sums keep the parts that are dropped: run"
                    " the parts in a loop of your own."
                )
            found.append(node.variable)
        stack += [following for following, _ in node.next_functions]
    return found


def _is_exchanged(leaf: Tensor) -> bool:
    """Whether a `ShardedOptimizer` sends the gradient to other ranks as soon as backward has it."""
    return any(getattr(hook, "exchanging", False) for hook in _hooks(leaf))


def _hooks(leaf: Tensor) -> Iterable[Any]:
    """What is called when its gradient is complete."""
    return (getattr(leaf, "_post_accumulate_grad_hooks", None) or {}).values()


def _reduced(value: float, operation: Any, group: dist.ProcessGroup) -> float:
    """A number over all ranks of a group."""
    tensor = torch.tensor(float(value), dtype=torch.float64, device=device_of(group))
    wait_for(start(dist.all_reduce, tensor, op=operation, group=group))
    return tensor.item()
