"""Experts in equal parts over the ranks of a mesh: parameters, checkpoints, and ranks that agree."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor


def check_mesh(mesh, num_experts: int, settings: Mapping[str, object]) -> None:
    """Every rank of the mesh calls it: their settings are the same, and the experts fall into equal parts.

    Raises:
        TypeError: mesh is not a DeviceMesh.
        ValueError: it has not one dimension or this rank is not in it; settings differ, on every rank; num_experts is
            not a multiple of the ranks.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"expert_mesh: expected a torch.distributed.device_mesh.DeviceMesh, got {type(mesh).__name__}.")
    if mesh.ndim != 1 or mesh.get_coordinate() is None:
        raise ValueError(f"expert_mesh: expected one dimension and this rank in it, got {mesh}.")
    group, device, ranks = mesh.get_group(), torch.device(mesh.device_type), mesh.size()
    own = torch.frombuffer(bytearray(json.dumps(settings).encode()), dtype=torch.uint8).to(device)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(ranks)]
    dist.all_gather(lengths, torch.tensor([own.numel()], device=device), group=group)
    longest = max(int(length) for length in lengths)
    texts = [own.new_empty(longest) for _ in range(ranks)]
    dist.all_gather(texts, torch.nn.functional.pad(own, (0, longest - own.numel()), value=ord(" ")), group=group)
    everyone = [json.loads(bytes(text.tolist())) for text in texts]
    for name in settings:
        values = [theirs.get(name) for theirs in everyone]
        if any(value != values[0] for value in values):
            raise ValueError(f"{name}: the ranks of expert_mesh differ: {', '.join(map(str, values))}.")
    if num_experts % ranks:
        raise ValueError(f"num_experts: expected a multiple of the {ranks} ranks of expert_mesh, got {num_experts}.")


def sharded(local: Tensor, mesh) -> Tensor:
    """A DTensor (E, ...) of each rank's (E / ranks, ...)."""
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False)


def shard_of(full: Tensor, mesh) -> Tensor:
    """The DTensor of a tensor (E, ...) that every rank has whole."""
    return sharded(full.chunk(mesh.size())[mesh.get_local_rank()].contiguous(), mesh)
