"""What a sharded optimizer is made with: checked, and said in lines that ranks can compare."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from memkernels.optim.agreement import check_agreement, check_member, is_left_out, start, wait_for
from memkernels.optim.local import is_distributed
from memkernels.optim.optimizer import LowMemoryOptimizer

STAGES = (1, 2, 3)
REDUCE_DTYPES = (None, torch.float32, torch.bfloat16)
OFFLOADS = (None, "host", "disk")


def group_of(
    process_group: dist.ProcessGroup | None, mesh: DeviceMesh | None, dimensions: tuple[int, ...]
) -> tuple[dist.ProcessGroup, Exception | None]:
    """The ranks' group: of a mesh that has one of so many dimensions, all of its ranks. Where they do not fit, the
    group that other ranks are likely to be in, and the error, which they are to hear of."""
    if not dist.is_initialized():
        raise RuntimeError("torch.distributed has no process group: call torch.distributed.init_process_group first.")
    everyone = dist.distributed_c10d._get_default_group()
    if not isinstance(process_group, (dist.ProcessGroup, type(None))) and not is_left_out(process_group):
        return everyone, ValueError(f"process_group: expected a ProcessGroup, got {process_group!r}.")
    group = everyone if process_group is None else process_group
    check_member(group)
    if mesh is None:
        return group, None
    if process_group is not None:
        return group, ValueError("mesh: expected none, since process_group is given.")
    if not isinstance(mesh, DeviceMesh) or mesh.ndim not in dimensions:
        return group, ValueError(
            f"mesh: expected a DeviceMesh of {' or '.join(map(str, dimensions))} dimensions, got {mesh!r}."
        )
    return (mesh if mesh.ndim == 1 else mesh._flatten()).get_group(), None


def check_options(stage: int, bucket_bytes: int, reduce_dtype: torch.dtype | None, offload: str | None) -> None:
    """Those that an optimizer in one process does not have."""
    if type(stage) is not int or stage not in STAGES:
        raise ValueError(f"stage: expected one of {STAGES}, got {stage!r}.")
    if isinstance(bucket_bytes, bool) or not isinstance(bucket_bytes, int) or bucket_bytes < 1:
        raise ValueError(f"bucket_bytes: expected a positive integer, got {bucket_bytes!r}.")
    if reduce_dtype not in REDUCE_DTYPES:
        raise ValueError(f"reduce_dtype: expected one of {REDUCE_DTYPES}, got {reduce_dtype!r}.")
    if offload not in OFFLOADS:
        raise ValueError(f"offload: expected one of {OFFLOADS}, got {offload!r}.")


def agreed_optimizer(
    group: dist.ProcessGroup,
    unfit: Exception | None,
    model: torch.nn.Module,
    optimizer_class: type[LowMemoryOptimizer],
    params: Iterable[Any] | None,
    defaults: dict[str, Any],
    check: Callable[[LowMemoryOptimizer], None],
    *options: Any,
    divided: bool = False,
) -> LowMemoryOptimizer:
    """The optimizer of one process, once every rank has made the same without an error, such as `unfit`.

    Args:
        divided: whether the parameters are DTensors.
    """
    error: Exception | None = None
    lines: list[str] = []
    try:
        if unfit is not None:
            raise unfit
        check_options(*options)
        whole = whole_optimizer(model, optimizer_class, params, defaults, divided)
        check(whole)
        lines = [
            f"{optimizer_class.__name__}, stage, bucket_bytes, reduce_dtype and offload {options}, {divided=}",
            *describe(model, whole),
        ]
    except Exception as caught:  # whatever it is: the others wait for this rank
        error = caught
    check_agreement(group, lines, error)
    return whole


def whole_optimizer(
    model: torch.nn.Module,
    optimizer_class: type[LowMemoryOptimizer],
    params: Iterable[Any] | None,
    defaults: dict,
    divided: bool,
) -> LowMemoryOptimizer:
    """The optimizer of one process, which checks parameters and options, of groups with the model's names."""
    if not isinstance(model, torch.nn.Module) or isinstance(model, DistributedDataParallel):
        raise TypeError(f"model: expected a module without DistributedDataParallel, got {type(model).__name__}.")
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, LowMemoryOptimizer)):
        raise TypeError(f"optimizer_class: expected an optimizer of memkernels.optim, got {optimizer_class!r}.")
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    groups: list[Any] = (
        [parameter for parameter in names if parameter.requires_grad] if params is None else _listed(params)
    )
    if not groups:
        name = "model" if params is None else "params"
        raise ValueError(f"{name}: expected a parameter that requires a gradient.")
    if not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    named = []
    for group in groups:
        members = group.get("params") if isinstance(group, dict) else None
        members = [members] if isinstance(members, Tensor) else _listed(members)
        members = [member[1] if isinstance(member, tuple) else member for member in members]
        for member in members:
            if not isinstance(member, Tensor):
                raise TypeError(f"params: expected parameters of model, got {type(member).__name__}.")
            if member not in names:
                raise ValueError(f"params: expected parameters of model, got another of shape {tuple(member.shape)}.")
            if is_distributed(member) and member.requires_grad and not divided:
                raise TypeError(f"{names[member]}: expected a tensor that is not divided yet, got a DTensor.")
        named.append(group | {"params": [(names[member], member) for member in members]})
    optimizer = optimizer_class(named, **defaults)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise ValueError(f"{name}: expected a tensor with values, got one on the meta device.")
    return optimizer


def _listed(params: Any) -> list[Any]:
    if not isinstance(params, Iterable):
        raise TypeError(f"params: expected parameters, or groups of them, got {type(params).__name__}.")
    return list(params)


def describe(model: torch.nn.Module, optimizer: LowMemoryOptimizer) -> list[str]:
    """What must be the same on every rank."""
    lines = []
    for number, group in enumerate(optimizer.param_groups):
        options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        lines.append(f"param_groups[{number}] {options}")
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            trained = "trained" if parameter.requires_grad else "frozen"
            lines.append(f"{trained} {name} {tuple(parameter.shape)} {parameter.dtype}")
    return lines + [f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in others(model, optimizer)]


def send_from_first(tensors: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """Gives every rank the first one's."""
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        wait_for(start(dist.broadcast, flat.view(torch.uint8), group=group, group_src=0))
        tensor.detach().copy_(flat.view(tensor.shape))


def others(model: torch.nn.Module, optimizer: LowMemoryOptimizer) -> Iterator[tuple[str, Tensor]]:
    """The dense tensors of a model that the optimizer does not train."""
    trained = {p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        dense = tensor.layout == torch.strided and not is_traceable_wrapper_subclass(tensor)
        if tensor not in trained and dense and tensor.numel() > 0:
            yield name, tensor
