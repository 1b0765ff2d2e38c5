"""An optimizer over the ranks of a process group, each with its part of the states: ZeRO, by itself stages 1 and 2."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from memkernels.offload.store import Tier, TieredStore
from memkernels.optim.agreement import device_of, on_all, start, wait_for
from memkernels.optim.buckets import BUCKET_BYTES
from memkernels.optim.checks import check_in_range, check_moving, check_step
from memkernels.optim.clipping import clip_factor
from memkernels.optim.optimizer import LowMemoryOptimizer
from memkernels.optim.sharded.arguments import agreed_optimizer, group_of, others, send_from_first
from memkernels.optim.sharded.gather import Gatherer
from memkernels.optim.sharded.gradients import Buffers, Gradients, PassingGradients, WholeGradients
from memkernels.optim.sharded.layout import Bucket, make_buckets
from memkernels.optim.sharded.own_parts import OwnParts
from memkernels.optim.sharded.param_groups import copy_options, named_parameters, with_parameters
from memkernels.optim.sharded.reduction import GradientHook, Reducer
from memkernels.optim.sharded.states import Part
from memkernels.optim.sharded.sums_on_tier import SumsOnTier
from memkernels.optim.sharded.whole import Owners
from memkernels.optim.sharded.zero_grad import drop_with
from memkernels.optim.tiers import offload_states


class ShardedOptimizer(torch.optim.Optimizer):
    """An optimizer of this package whose states, and gradients, are divided among ranks (ZeRO, Rajbhandari et al. 2019,
    arXiv 1910.02054), in place of DistributedDataParallel and the optimizer:

        optimizer = ShardedOptimizer(model, AdamW, stage=2, lr=1e-4, state_bits=8)
        for batch in batches:  # each rank has batches of its own
            model(batch).loss.backward()
            optimizer.step(max_norm=1.0)

    The step is that of `optimizer_class` in one process with the mean of the ranks' gradients. Bytes a parameter on
    each of N ranks, for AdamW with states of S bytes (8 at 32 bits), parameters and gradients of P bytes (4 or 2):

    | stage | parameters | gradients | states |
    | --- | --- | --- | --- |
    | 1 | P | P | S / N |
    | 2 | P | P / N | S / N |
    | 3 | P / N | P / N | S / N |

    and on their way five buckets at the most (stage 1: two). A parameter larger than `bucket_bytes` is a bucket of its
    own size, whose memory is there while it is on its way. Stage 1 copies no gradient; stage 2 copies each into its
    bucket and frees it. A bucket is exchanged while backward goes on with the next. New parameters are sent when `step`
    ends and arrive while the next forward runs: the elements of the model's outermost `ModuleList`s and `Sequential`s
    wait for their parameters when they are called, any other module for what it has outside of these. Whoever reads
    parameters without calling the modules that hold them, or copies the model, calls `wait()` first; `state_dict` and
    `load_state_dict` of the model do.

    Stage 3 is torch's FSDP2: `fully_shard` on the same layers and the model, with this optimizer on each rank's rows of
    every parameter; a mesh of two dimensions (replicas, shards) divides among the second and copies along the first
    (hybrid sharding). What FSDP2 asks holds: the model is called as a whole, every rank calls the same layers (of what
    is in them a rank may leave out parameters), and the last part of a batch is outside of `no_sync()`; `step` raises
    RuntimeError otherwise. Random bits are those of the element's index in the whole parameter, wherever a rank's rows
    begin; states in 8 or 4 bits need rows that fall to the ranks at multiples of 256 elements. A model that
    `fully_shard` has been applied to stays as it is, for another optimizer with other `params`, or as the caller
    divided it. What follows is of stages 1, 2.

    Each rank has ranges of elements, cut at multiples of 256 elements of each parameter, whatever the parameters'
    sizes. No block of states in few bits is cut, random bits are those of the element's index, and so every storage
    gives the same for the same gradients at any number of ranks. `Muon` and `Adafactor`, whose updates need a whole
    parameter, have the states of each on one rank, about as many elements on each rank; when `step` begins, the sums of
    a rank's parameters come to it, and it has all of them until the step ends. Muon is for matrices: all else has
    another ShardedOptimizer, with a process group of its own by `torch.distributed.new_group()`.

    Gradients: outside of `no_sync()` each backward adds the ranks' gradients to the sums that the next step takes;
    within it each rank adds to its own. `step` consumes them, and no `zero_grad` is needed. A parameter is stepped
    where any rank had a gradient for it; one that none had is left as it is. Where the sum of all squares is not
    finite, no rank steps, and `skipped` is True. Between backward and step `grad` is None (stage 2) or not all of the
    gradient (stage 1). `zero_grad` of the model as a whole drops the sums too. Every rank calls backward and step
    equally often; without any data, on a loss of zero.

    Parameters become views into buckets, contiguous, and have rank 0's values at first, as other tensors of the model
    do. `param_groups` are those of the model's parameters, and schedulers work on them.

    Args:
        model: the module, not wrapped by DistributedDataParallel; the same on every rank. At stage 3 it may have been
            divided by `fully_shard`.
        optimizer_class: `AdamW`, `Lion`, `SGD`, `Muon` or `Adafactor` of `memkernels.optim`.
        stage: 1, 2 or 3.
        params: groups of the model's parameters, as an optimizer takes them; all that require a gradient by default.
        process_group: the ranks; all of them by default.
        mesh: of one dimension, or at stage 3 of two, in place of process_group.
        bucket_bytes: the size of a bucket at stages 1 and 2; a larger parameter has one of its own.
        reduce_dtype: of gradients on their way; the parameters' by default. At stages 1 and 2 those that arrive are
            added up in float32, and the sum is kept in the parameters' dtype; stage 3 is as FSDP2 has it.
        offload: where each rank's states are between steps: as `memkernels.optim.offload_states` has it, which on
            `local`, the optimizer of this rank's parts, takes a path and limits too. Of gradients see
            `offload_gradients`.
        defaults: the optimizer's arguments.

    Raises:
        TypeError: model, optimizer_class or params is of another kind; and what the optimizer raises.
        ValueError: a stage that does not exist, parameters on several devices, ranks whose models or arguments differ;
            and what the optimizer raises. On every rank, with the reason of the first rank that has one.
        RankFailure: an exchange failed since another rank has ended; a RuntimeError. `step`, `clip_grad_norm_`, `wait`
            and backward raise it too, at the latest after the process group's timeout.
    """

    # `ShardedGradScaler` leaves the division by its scale, and the skipping of a step, to the optimizer.
    _step_supports_amp_scaling = True
    _judged = False  # by `unscale`, since the last step

    def __new__(cls, *arguments: Any, stage: int = 2, **options: Any) -> ShardedOptimizer:
        if stage == 3:
            from memkernels.optim.sharded.fully import FullyShardedOptimizer

            cls = FullyShardedOptimizer
        return super().__new__(cls)

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer_class: type[LowMemoryOptimizer],
        *,
        stage: int = 2,
        params: Iterable[Any] | None = None,
        process_group: dist.ProcessGroup | None = None,
        mesh: DeviceMesh | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        reduce_dtype: torch.dtype | None = None,
        offload: Literal["host", "disk"] | None = None,
        **defaults: Any,
    ) -> None:
        group, error = group_of(process_group, mesh, dimensions=(1,))
        self.process_group = group
        whole = agreed_optimizer(
            group,
            error,
            model,
            optimizer_class,
            params,
            defaults,
            lambda _: None,
            stage,
            bucket_bytes,
            reduce_dtype,
            offload,
        )
        super().__init__([with_parameters(of, of["params"]) for of in whole.param_groups], whole.defaults)
        self.stage, self.grad_norm, self.skipped = stage, torch.zeros(()), False
        rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)
        trained = [named for named in named_parameters(self.param_groups) if named[1].requires_grad]
        device = trained[0][1].device if trained else device_of(group)
        buckets = make_buckets(trained, self._ranks, bucket_bytes)
        send_from_first((tensor for _, tensor in others(model, whole)), group)
        values = [_into_bucket(bucket, device, group) for bucket in buckets]
        wire = [reduce_dtype or bucket.dtype for bucket in buckets]
        buffers = Buffers(buckets, bucket_bytes, device)
        if stage == 1:
            gradients: Gradients = WholeGradients(buckets, rank, buffers, wire, device)
        else:
            shards = [torch.zeros(bucket.shard_size, dtype=bucket.dtype, device=device) for bucket in buckets]
            gradients = PassingGradients(buckets, buffers, wire, shards)
        self._owners = None if optimizer_class.elementwise else Owners(buckets, group)
        self._gatherer = Gatherer(model, buckets, values, group, self._owners)
        self._reducer = Reducer(buckets, gradients, buffers, self._gatherer, group)
        self._own = OwnParts(buckets, values, rank, self._owners)
        self.local = self._own.make_optimizer(optimizer_class, self.param_groups, defaults)
        self._offload(offload)
        self._totals_of_step: tuple[Tensor, set[int]] | None = None
        drop_with(model, self)
        self._complete = True

    def offload_gradients(
        self,
        tier: Tier,
        *,
        max_host_bytes: int | None = None,
        path: str | os.PathLike[str] | None = None,
        min_bytes: int = 1 << 20,
        prefetch: int = 2,
    ) -> None:
        """Keeps this rank's sums of gradients on a tier from their exchange to the step, at stage 2.

        Every rank calls it. It is for batches in parts: P / N bytes a parameter are not in memory between backwards.
        Each moves the sum of a bucket to the tier, and the one before it back; a step takes them one by one, but for
        Muon and Adafactor, for which all are in memory when it begins. It gives the bits that sums in memory give; with
        max_norm but for the order in which float64 squares are added up.

        Args:
            tier, max_host_bytes, path: as `memkernels.optim.offload_gradients` has them.
            min_bytes: smaller sums of a bucket stay.
            prefetch: of how many buckets sums are read ahead.

        Raises:
            ValueError: another stage, min_bytes, prefetch, or one of those of `TieredStore`, does not fit; or they are
                offloaded already.
            RuntimeError: there are gradients.
            OSError: path does not exist or cannot be written. Each of these on every rank, on those where all is well
                as ValueError. After a backward whose sums could not be written or read, and so too where one does not
                fit into max_host_bytes (MemoryError), it comes from the next `step` or `clip_grad_norm_`, before any
                parameter has changed; `zero_grad()` drops what there is.
        """

        def on_tier() -> SumsOnTier:
            check_moving(min_bytes, prefetch)
            if self.stage != 2:
                raise ValueError(f"optimizer: expected stage 2, whose sums are apart from gradients, got {self.stage}.")
            if isinstance(self._reducer.gradients, SumsOnTier):
                raise ValueError("optimizer: its gradients are offloaded already.")
            store = TieredStore(tier, max_host_bytes=max_host_bytes, path=path)
            return self._reducer.with_sums_on(store, min_bytes, prefetch)

        self._reducer.gradients = on_all(self.process_group, on_tier)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuses: what each rank has is settled when the optimizer is made."""
        if hasattr(self, "_complete"):
            raise RuntimeError("groups are added when the optimizer is made: params=[...].")
        super().add_param_group(param_group)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within it backward adds to this rank's gradients and exchanges nothing: of a batch in parts all but the last.

        The gradients are whole meanwhile, in stage 2 too; there an exchange for each part takes less memory.
        """
        with self._reducer.no_exchange():
            yield

    def wait(self) -> None:
        """Until all parameters have the values of the last step."""
        self._gatherer.wait()

    def send_values(self) -> None:
        """Gives the other ranks what this one wrote into its own parts."""
        self._gatherer.start()
        self._gatherer.wait()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops all gradients since the last step, which drops them itself. `zero_grad` of the model does the same."""
        self._totals_of_step = None
        self._reducer.clear()

    @contextmanager
    def unchanged_by_failure(
        self, listen: Callable[[Exception | None], None], together: Callable[[Callable[[], Any]], Any]
    ) -> Iterator[None]:
        """Within it backwards whose exchanges are complete, or an error on every rank, which leaves the gradients as
        they were before: `micro_batch`'s. A rank that fails calls `abandon_backward`.

        Args:
            listen: raises where a rank has failed, this one by the error that it is given. It is called before each
                exchange at stage 3, and before that of a bucket larger than `bucket_bytes` at stages 1 and 2.
            together: function() on every rank; where one fails, every rank raises.
        """
        reducer = self._reducer
        together(functools.partial(self._check_exchanging, reducer.exchanging))
        together(reducer.reserve)
        with reducer.listening(listen):
            if reducer.has_unsent():
                try:
                    together(reducer.flush)
                except BaseException:
                    self.zero_grad()
                    raise
            kept = together(reducer.keep)
            try:
                yield
            except BaseException:
                reducer.restore(kept)
                self._totals_of_step = None
                raise

    def exchanges(self, hook: GradientHook) -> bool:
        """Whether it is this optimizer that exchanges the gradient of a parameter with that hook."""
        return hook.is_of(self._reducer)

    @property
    def backwards(self) -> int:
        """How many backwards have exchanged their gradients."""
        return self._reducer.backwards

    def end_backward(self) -> None:
        """Exchanges what is left of a backward, or all where this rank has none: the others wait for it."""
        self._reducer.end_backward()

    def abandon_backward(self, error: Exception) -> None:
        """After an error on this rank within `unchanged_by_failure`: takes part in the others' backward until it ends,
        or until they listen, which raises."""
        self._reducer.abandon(error)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Multiplies all gradients by min(1, max_norm / (norm + 1e-6)); returns the norm of them all, 0-dim float32.

        A norm that is not finite changes nothing. `step(max_norm=...)` does the same without a pass over them.
        """
        check_in_range("max_norm", max_norm, 1e-38)
        norm = self._norm_of_sums() / self._ranks
        factor = clip_factor(norm, max_norm).item()
        if norm.isfinite() and factor < 1.0:
            self._multiply_gradients(factor)
        return norm

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        max_norm: float | None = None,
        loss_scale: float | Tensor = 1.0,
    ) -> Any:
        """One step with the mean of the ranks' gradients; every rank calls it.

        Args:
            closure: computes the loss and its gradients anew; its result is returned.
            max_norm: as `clip_grad_norm_` before the step; `grad_norm` holds the norm in any case.
            loss_scale: what the loss was multiplied by: the gradients are divided by it, before they are clipped.
                `ShardedGradScaler` hands its scale over itself.

        Raises:
            TypeError: torch's GradScaler called it, which would have each rank judge its own gradients.
            ValueError: max_norm or loss_scale is not positive.
            RuntimeError: a parameter was frozen when the optimizer was made, or has other memory since.
            OSError: with offload, of this rank's disk; ValueError where it is another's. Ranks' parts made the step,
                all or some, and are not gathered: go on from the last checkpoint. With `offload_gradients`, also of a
                backward before it, as that says.
            RankFailure: another rank has ended.
        """
        check_step(max_norm, loss_scale)
        self._check_parameters()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale = 1.0 / (self._ranks * float(loss_scale) * self._scale_of_scaler())
        self.grad_norm = self._norm_of_sums() * scale
        self.skipped = not self.grad_norm.isfinite().item()
        if not self.skipped:
            if max_norm is not None:
                scale *= clip_factor(self.grad_norm, max_norm).item()
            self._step(scale)
        self.zero_grad()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """This rank's part, for the same rank of as many; `save_checkpoint` writes what any number of them load."""
        copy_options(self.param_groups, self.local.param_groups)
        return self.local.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave on the same rank.

        Raises:
            ValueError: it is of another model, or of another number of ranks; nothing is changed then.
        """
        self.local.load_state_dict(state_dict)
        copy_options(self.local.param_groups, self.param_groups)

    def parts(self) -> list[list[Part]]:
        """What this rank holds of each group's parameters, as parameters of `local`, its own optimizer."""
        names, groups = iter(named_parameters(self.param_groups)), []
        for group in self.local.param_groups:
            of_group = [
                Part(name, part, self.local.origins.get(part, 0), whole.shape)
                for part, (name, whole, _) in zip(group["params"], names, strict=False)
            ]
            groups.append(of_group)
        return groups

    @torch.no_grad()
    def unscale(self, factor: float) -> bool:
        """`ShardedGradScaler`'s: whether all ranks' gradients are finite; they are multiplied by a factor then."""
        finite = bool(self._norm_of_sums().isfinite())
        if finite and factor != 1.0:
            self._multiply_gradients(factor)
        self._judged = True
        return finite

    def _check_parameters(self) -> None:
        for name, parameter, place in named_parameters(self.param_groups):
            if parameter.requires_grad and place not in self._own:
                raise RuntimeError(f"{name}: it was frozen when the optimizer was made, which has no part of it.")
        self._gatherer.check_places()

    def _scale_of_scaler(self) -> float:
        """What a scaler says that the loss was multiplied by."""
        if hasattr(self, "found_inf") and not self._judged:
            raise TypeError(
                "scaler: expected a memkernels.optim.ShardedGradScaler, since torch's has each rank judge its own"
                " gradients."
            )
        self._judged = False
        scale = getattr(self, "grad_scale", None)
        return 1.0 if scale is None else float(scale)

    @staticmethod
    def _check_exchanging(exchanging: bool) -> None:
        if not exchanging:
            raise RuntimeError("micro_batch exchanges the gradients of each part: call it outside of no_sync().")

    def _norm_of_sums(self) -> Tensor:
        """The norm of the sums of all gradients over `_ranks` ranks, 0-dim float32."""
        return self._totals()[0].sqrt().float()

    def _multiply_gradients(self, factor: float) -> None:
        self._reducer.gradients.multiply(factor)
        self._totals()[0].mul_(factor**2)

    def _step(self, scale: float) -> None:
        """The step of this rank's parts by the sums times `scale`."""
        _, present = self._totals()
        self._gatherer.wait()
        copy_options(self.param_groups, self.local.param_groups)
        if self._owners is None:
            self._where_disks_fail(lambda: self._step_by_sums(present, scale))
        else:
            grads = self._owners.gather(self._where_disks_fail(self._all_sums), present)
            self._where_disks_fail(lambda: self._step_by(grads, present, scale))
        stepped = [parameter for _, parameter, i in named_parameters(self.param_groups) if i in present]
        torch.autograd.graph.increment_version(stepped)
        self._gatherer.start()

    def _where_disks_fail(self, function: Callable[[], Any]) -> Any:
        """function(); where there are disks on every rank or on none."""
        if self.local.tiers is None and not self._reducer.gradients.may_fail:
            return function()
        return on_all(self.process_group, function)

    def _all_sums(self) -> dict[int, Tensor]:
        """This rank's range of each parameter's sum, by place in the optimizer."""
        shards = {i: shard for sums in self._reducer.gradients.sums() for i, shard in sums.items()}
        return self._own.ranges(shards)

    def _step_by_sums(self, present: set[int], scale: float) -> None:
        for sums in self._reducer.gradients.sums():
            self._step_by(self._own.ranges(sums), present, scale)

    def _step_by(self, grads: Mapping[int, Tensor], present: set[int], scale: float) -> None:
        """The step of those parts that are `present` and have gradients, by place in the optimizer."""
        for index in present & grads.keys():
            self._own.part(index).grad = grads[index]
        try:
            self.local.step_scaled(scale)
        finally:
            self.local.zero_grad()

    def _offload(self, tier: Literal["host", "disk"] | None) -> None:
        if tier is not None:
            on_all(self.process_group, lambda: offload_states(self.local, tier))

    def _totals(self) -> tuple[Tensor, set[int]]:
        """The sum of the squares of all sums of gradients, float64, and which parameters had a gradient on any rank."""
        if self._reducer.finish():
            self._totals_of_step = None
        if self._totals_of_step is None:
            device = device_of(self.process_group)
            flags = torch.zeros(len(named_parameters(self.param_groups)), dtype=torch.float64)
            flags[list(self._reducer.present)] = 1.0
            square = self._where_disks_fail(self._reducer.gradients.square)
            totals = torch.cat((square.reshape(1).to(device), flags.to(device)))
            wait_for(start(dist.all_reduce, totals, group=self.process_group))
            square, flags = totals.cpu().tensor_split([1])  # the only place in a step where the host waits for a GPU
            self._totals_of_step = square[0], set(flags.nonzero().view(-1).tolist())
        return self._totals_of_step


def _into_bucket(bucket: Bucket, device: torch.device, group: dist.ProcessGroup) -> Tensor:
    """A bucket of the first rank's values, of which the parameters become views."""
    flat = torch.zeros(bucket.size, dtype=bucket.dtype, device=device)
    for piece in bucket.pieces:
        bucket.view(flat, piece).copy_(piece.parameter.detach())
        piece.parameter.data = bucket.view(flat, piece)
    wait_for(start(dist.broadcast, flat, group=group, group_src=0))
    return flat
