"""Experts in equal parts over the ranks of a mesh: parameters, checkpoints, and ranks that agree."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor


def check_mesh(mesh, num_experts: int, settings: Mapping[str, object]) -> None:
    """Every rank of the mesh calls it: their settings are the same, and the experts fall into equal parts.

    Raises:
        TypeError: mesh is not a DeviceMesh.
        ValueError: it has not one dimension or this rank is not in it; num_experts is not a multiple of the ranks; as
            `check_settings`.
    """
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"expert_mesh: expected a torch.distributed.device_mesh.DeviceMesh, got {type(mesh).__name__}.")
    if mesh.ndim != 1 or mesh.get_coordinate() is None:
        raise ValueError(f"expert_mesh: expected one dimension and this rank in it, got {mesh}.")
    check_settings(mesh, settings)
    if num_experts % mesh.size():
        raise ValueError(
            f"num_experts: expected a multiple of the {mesh.size()} ranks of expert_mesh, got {num_experts}."
        )


def check_settings(mesh, settings: Mapping[str, object]) -> None:
    """Every rank of the mesh calls it: their settings are the same.

    Raises:
        ValueError: they differ; on every rank.
    """
    import torch.distributed as dist

    group, device, ranks = mesh.get_group(), torch.device(mesh.device_type), mesh.size()
    own = torch.frombuffer(bytearray(json.dumps(settings, default=str).encode()), dtype=torch.uint8).to(device)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(ranks)]
    dist.all_gather(lengths, torch.tensor([own.numel()], device=device), group=group)
    longest = max(int(length) for length in lengths)
    texts = [own.new_empty(longest) for _ in range(ranks)]
    dist.all_gather(texts, torch.nn.functional.pad(own, (0, longest - own.numel()), value=ord(" ")), group=group)
    everyone = [json.loads(bytes(text.tolist())) for text in texts]
    for name in dict.fromkeys(chain.from_iterable(everyone)):
        values = [theirs.get(name) for theirs in everyone]
        if any(value != values[0] for value in values):
            raise ValueError(f"{name}: the ranks of expert_mesh differ: {', '.join(map(str, values))}.")


def sharded(local: Tensor, mesh) -> Tensor:
    """Of each rank's (E / ranks, ...), a DTensor (E, ...); without a mesh, which is None, (E, ...) itself."""
    if mesh is None:
        return local
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False)


def held(weight: Tensor, mesh) -> Tensor:
    """Of the experts those that this rank holds: of a DTensor (E, ...); of another weight all."""
    if mesh is None:
        return weight
    from torch.distributed.tensor import DTensor

    return weight.to_local() if isinstance(weight, DTensor) else weight


def gathered(weight: Tensor, mesh) -> Tensor:
    """Of a DTensor (E, ...) a plain tensor of all experts, on every rank of the mesh, which all call it."""
    return weight if mesh is None else cast(Any, weight).full_tensor()


def own_part(whole: Tensor, mesh) -> Tensor:
    """Of a plain tensor (E, ...) the experts that this rank holds."""
    return whole if mesh is None else whole.chunk(mesh.size())[mesh.get_local_rank()].contiguous()


@torch.no_grad()
def draw_experts(weight: Tensor, mesh, draw: Callable[..., object]) -> None:
    """draw(matrix, generator=...) of each expert by a seed of its own, the same on any number of ranks."""
    seeds = torch.randint(2**63 - 1, (weight.shape[0],), device="cpu")
    if weight.is_meta:
        return
    matrices = held(weight, mesh)
    first = 0 if mesh is None else mesh.get_local_rank() * matrices.shape[0]
    for matrix, seed in zip(matrices, seeds[first:].tolist(), strict=False):
        draw(matrix, generator=torch.Generator(matrix.device).manual_seed(seed))


def take_shards(module: torch.nn.Module, names: Sequence[str], mesh, state_dict: dict[str, Any], prefix: str) -> None:
    """In the state_dict, for parameters that are whole, as one process saved them, the part that this rank holds."""
    for name in names if mesh is not None else ():
        given: Any = state_dict.get(prefix + name)
        if type(given) in (Tensor, torch.nn.Parameter) and given.shape == getattr(module, name).shape:
            state_dict[prefix + name] = sharded(own_part(given, mesh), mesh)
