"""Stage 3 of ZeRO: parameters, too, are divided among ranks, by torch's FSDP2."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from memkernels.optim.agreement import device_of, exchanging, on_all
from memkernels.optim.blocks import check_cuts, cuts_of_rows
from memkernels.optim.buckets import BUCKET_BYTES
from memkernels.optim.clipping import total_norm
from memkernels.optim.local import division_of, first_element, local_of
from memkernels.optim.optimizer import LowMemoryOptimizer
from memkernels.optim.sharded.arguments import agreed_optimizer, group_of, others, send_from_first
from memkernels.optim.sharded.fsdp_exchanges import Exchanges
from memkernels.optim.sharded.gather import layers_of
from memkernels.optim.sharded.optimizer import ShardedOptimizer
from memkernels.optim.sharded.param_groups import with_parameters
from memkernels.optim.sharded.presence import Presence
from memkernels.optim.sharded.reduction import GradientHook
from memkernels.optim.sharded.states import Part
from memkernels.optim.sharded.zero_grad import drop_with


class FullyShardedOptimizer(ShardedOptimizer):
    """What `ShardedOptimizer` is with stage=3.

    FSDP2's own hooks gather parameters, exchange gradients and check what they meet: what starts, awaits or counts this
    at stages 1 and 2 has nothing to do here.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer_class: type[LowMemoryOptimizer],
        *,
        stage: int = 3,
        params: Iterable[Any] | None = None,
        process_group: dist.ProcessGroup | None = None,
        mesh: DeviceMesh | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        reduce_dtype: torch.dtype | None = None,
        offload: Literal["host", "disk"] | None = None,
        **defaults: Any,
    ) -> None:
        group, error = group_of(process_group, mesh, dimensions=(1, 2))
        self.process_group = group
        divided = isinstance(model, FSDPModule)
        check = functools.partial(_check_division, group, reduce_dtype)
        if not divided:
            ranks = dist.get_world_size(group) if mesh is None or error is not None else mesh.size(-1)
            check = functools.partial(_check_shapes, ranks)
        whole = agreed_optimizer(
            group, error, model, optimizer_class, params, defaults, check, stage, bucket_bytes, reduce_dtype, offload,
            divided=divided,
        )  # fmt: skip
        trained = [p for of_group in whole.param_groups for p in of_group["params"] if p.requires_grad]
        if not divided:
            send_from_first([*trained, *(tensor for _, tensor in others(model, whole))], group)
            mesh = mesh or _mesh_of(group, trained[0].device.type if trained else device_of(group).type)
            policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
            for layer in layers_of(model):
                fully_shard(layer, mesh=mesh, mp_policy=policy)
            fully_shard(model, mesh=mesh, mp_policy=policy)
        self._model = cast(FSDPModule, model)
        self._exchanges = Exchanges.of(self._model)
        self._presence = Presence(self._model)
        parameters = dict(model.named_parameters())
        groups = [
            with_parameters(of_group, (parameters[name] for name in of_group["param_names"]))
            for of_group in whole.param_groups
        ]
        self.local = optimizer_class(groups, **defaults)
        self._offload(offload)
        torch.optim.Optimizer.__init__(self, [{"params": [torch.empty(0)]}], self.local.defaults)
        self.param_groups = self.local.param_groups
        self.stage, self.grad_norm, self.skipped = stage, torch.zeros(()), False
        self._ranks = 1  # FSDP2 has taken the mean over the ranks
        self._syncing = True
        drop_with(model, self)
        self._complete = True

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        before, self._syncing = self._syncing, False
        self._model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self._syncing = before
            self._model.set_requires_gradient_sync(before)

    def wait(self) -> None:
        """There is nothing to wait for: FSDP2 gathers parameters when they are used."""

    @contextmanager
    def unchanged_by_failure(
        self, listen: Callable[[Exception | None], None], together: Callable[[Callable[[], Any]], Any]
    ) -> Iterator[None]:
        together(functools.partial(self._check_exchanging, self._syncing))
        together(self._check_synced)
        parameters = list(cast(torch.nn.Module, self._model).parameters())  # those that others step too
        before = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        try:
            with self._exchanges.after(functools.partial(listen, None)):
                yield
        except BaseException:
            self._model.reset_iter_state()
            self.zero_grad()
            for parameter, grad in zip(parameters, before, strict=True):
                parameter.grad = grad
            raise
        for parameter, grad in zip(parameters, before, strict=True):
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else grad.add_(parameter.grad)

    def exchanges(self, hook: GradientHook) -> bool:
        """No hook of a reducer is this one's: the hooks are FSDP2's."""
        return False

    @property
    def backwards(self) -> int:
        """No count: FSDP2 ends a backward by itself, also one whose loss has none of the parameters."""
        return 0

    def end_backward(self) -> None:
        """A rank without a backward owes nothing: every rank calls the same layers, as FSDP2 asks."""

    def abandon_backward(self, error: Exception) -> None:
        """The others hear of it before the next of FSDP2's exchanges, and leave that out."""

    def send_values(self) -> None:
        """No other rank keeps this one's parts: FSDP2 gathers them anew."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.local.zero_grad(set_to_none)
        self._presence.clear()
        for of in self._unsynced():
            of.unsharded_accumulated_grad = of.unsharded_param.grad = None

    def state_dict(self) -> dict[str, Any]:
        return self.local.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.local.load_state_dict(state_dict)
        self.param_groups = self.local.param_groups

    def parts(self) -> list[list[Part]]:
        return [
            [
                Part(name, parameter, first_element(parameter), parameter.shape)
                for name, parameter in zip(group["param_names"], group["params"], strict=True)
            ]
            for group in self.param_groups
        ]

    def _gradients(self) -> list[Tensor]:
        return [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]

    def _unsynced(self) -> Iterator[Any]:
        """FSDP2's records of the parameters that have gradients of `no_sync()`, which no parameter's `grad` shows."""
        for module in cast(torch.nn.Module, self._model).modules():
            for group in module._get_fsdp_state()._fsdp_param_groups if isinstance(module, FSDPModule) else ():
                for of in group.fsdp_params:
                    whole = getattr(of, "_unsharded_param", None)  # none before the first forward
                    if whole is not None and (whole.grad is not None or of.unsharded_accumulated_grad is not None):
                        yield of

    def _check_synced(self) -> None:
        if any(True for _ in self._unsynced()):
            raise RuntimeError(
                "gradients of no_sync() were not exchanged: at stage 3 the last part of a batch runs outside of it."
            )

    def _check_parameters(self) -> None:
        """FSDP2 checks them itself, at the next forward."""

    def _norm_of_sums(self) -> Tensor:
        self._check_synced()
        with exchanging(self.process_group):
            return total_norm(self._gradients())

    def _multiply_gradients(self, factor: float) -> None:
        for grad in self._gradients():
            local_of(grad).mul_(factor)

    def _step(self, scale: float) -> None:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self._presence.drop_absent(parameters, self.process_group)
        if self.local.tiers is None:
            self.local.step_scaled(scale)
        else:  # a disk may fail on one rank
            on_all(self.process_group, lambda: self.local.step_scaled(scale))


def _mesh_of(group: dist.ProcessGroup, device_type: str) -> DeviceMesh:
    """Of a group's ranks. One of another group than the default has a name of its own: DTensor takes meshes of the same
    ranks and names for the same, and exchanges by the group of the first, which may have failed since."""
    names = None if group is dist.group.WORLD else (f"ranks_of_{group.group_name}",)
    return DeviceMesh.from_group(group, device_type, mesh_dim_names=names)


def _check_division(group: dist.ProcessGroup, reduce_dtype: torch.dtype | None, optimizer: LowMemoryOptimizer) -> None:
    """Raises where parameters of a model that is divided already are divided among other ranks."""
    if reduce_dtype is not None:
        raise ValueError(f"reduce_dtype: expected None for a model that is divided already, got {reduce_dtype}.")
    for of_group in optimizer.param_groups:
        for name, parameter in zip(of_group["param_names"], of_group["params"], strict=True):
            division = division_of(parameter)
            if division is None and parameter.requires_grad:
                raise TypeError(f"{name}: expected a DTensor, as fully_shard makes them, got a plain tensor.")
            if division is not None:
                among = sorted(division[0].mesh.flatten().tolist())
                if among != sorted(dist.get_process_group_ranks(group)):
                    raise ValueError(f"process_group: expected the ranks {among} that {name} is divided among.")
    _check_shapes(None, optimizer)  # the optimizer has checked how they are divided


def _check_shapes(ranks: int | None, optimizer: LowMemoryOptimizer) -> None:
    """Raises where a parameter has no elements, or `ranks` would have rows of one that begin within a block of states
    in few bits."""
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            if parameter.requires_grad and parameter.numel() == 0:
                raise ValueError(
                    f"{name}: expected elements, without which FSDP2's backward fails, got shape"
                    f" {tuple(parameter.shape)}: freeze it, or take stage 1 or 2."
                )
            if parameter.requires_grad and parameter.dim() and ranks is not None and optimizer.has_blocks(group):
                check_cuts(name, parameter.shape, {0: cuts_of_rows(parameter.shape[0], ranks)})
