"""An optimizer's states by the names of the model's parameters, whoever holds which part of them."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memkernels.optim.codes import BLOCK_SIZE, decode
from memkernels.optim.loading import STORAGE
from memkernels.optim.local import local_of
from memkernels.optim.optimizer import LowMemoryOptimizer
from memkernels.optim.rounding import join
from memkernels.optim.sharded.flat_shard import FlatShard

# Of states, torch's too.
DTYPES = {
    str(dtype): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int16)
}


class Part(NamedTuple):
    """What a process holds of a parameter of the model: the elements from `first` on, as `parameter` of its optimizer.

    `shape` is the whole parameter's.
    """

    name: str
    parameter: Tensor
    first: int
    shape: torch.Size

    @property
    def is_held(self) -> bool:
        """Whether states have a place: a `ShardedOptimizer` at stage 1 or 2 has nothing of a frozen parameter."""
        return self.parameter.requires_grad or self.parameter.shape == self.shape


def groups_to_json(parts: Sequence[Sequence[Part]], optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Options of every group, and its parameters: shape, steps, and the dtypes of what is kept for each."""
    groups = []
    for group, of_group in zip(optimizer.param_groups, parts, strict=True):
        members = {}
        for part in of_group:
            state = optimizer.state.get(part.parameter, {})
            members[part.name] = {
                "shape": list(part.shape),
                "step": float(state["step"]) if "step" in state else None,
                "state": {key: str(value.dtype) for key, value in _tensors(state)},
            }
        options = {key: _to_json(value) for key, value in group.items() if key not in ("params", "param_names")}
        groups.append({"options": options, "parameters": members})
    return groups


def states_to_save(parts: Sequence[Sequence[Part]], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every state with elements as a range of a tensor of one dimension."""
    saved: dict[str, Tensor] = {}
    for group, of_group in zip(optimizer.param_groups, parts, strict=True):
        for part in of_group:
            for key, value in _tensors(optimizer.state.get(part.parameter, {})):
                local, bits = local_of(value).reshape(-1), group.get("state_bits", 32)
                shard = _shard(local, key, part, bits, optimizer)
                if shard.numel():
                    saved[f"state.{part.name}.{key}"] = shard
    return saved


def states_to_fill(
    parts: Sequence[Sequence[Part]], groups: Sequence[Mapping[str, Any]], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """New tensors for the ranges that a checkpoint's `groups` have of these parts: whole blocks of its states."""
    bits = {name: group["options"].get("state_bits", 32) for group in groups for name in group["parameters"]}
    saved = {name: member for group in groups for name, member in group["parameters"].items()}
    filled: dict[str, Tensor] = {}
    for part in (part for of_group in parts for part in of_group if part.name in saved):
        for key, dtype in saved[part.name]["state"].items():
            shape, of = local_of(part.parameter).shape, bits[part.name]
            before = _before(part, of) if _is_code(key, of) and key not in _shapes_apart(shape, optimizer) else 0
            size = _size(torch.Size([before + shape.numel()]) if before else shape, key, of, optimizer)
            local = torch.empty(size, dtype=DTYPES[dtype], device=part.parameter.device)
            whole_blocks = part._replace(first=part.first - before)
            filled[f"state.{part.name}.{key}"] = _shard(local, key, whole_blocks, of, optimizer)
    return filled


def state_dict_of(
    parts: Sequence[Sequence[Part]],
    groups: Sequence[Mapping[str, Any]],
    filled: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> dict[str, Any]:
    """What `optimizer.load_state_dict` takes: the filled ranges, in float32 or wider for an optimizer of torch, and in
    float32 where parts of a group begin within blocks, whose other elements are not theirs."""
    of_name = {name: group for group in groups for name in group["parameters"]}
    state: dict[int, dict[str, Any]] = {}
    param_groups: list[dict[str, Any]] = []
    place = 0
    for own, of_group in zip(optimizer.param_groups, parts, strict=True):
        names = [part.name for part in of_group if part.name in of_name]
        source = of_name[names[0]] if names else {"options": {}, "parameters": {}}
        for name in names:
            if of_name[name] is not source:
                raise ValueError(f"{name}: expected in one group with {names[0]}, as in the optimizer.")
        options = (
            {key: tuple(v) if isinstance(v, list) else v for key, v in source["options"].items()} if source else {}
        )
        if not isinstance(optimizer, LowMemoryOptimizer):
            options = {key: value for key, value in options.items() if key in own and key not in STORAGE}
        bits = source["options"].get("state_bits", 32)
        decoded = not isinstance(optimizer, LowMemoryOptimizer) or any(_before(part, bits) for part in of_group)
        if decoded and "state_bits" in options:
            options["state_bits"] = 32
        options = {key: value for key, value in own.items() if key not in ("params", "param_names")} | options
        param_groups.append(options | {"params": list(range(place, place + len(of_group)))})
        for part in of_group:
            member = source["parameters"].get(part.name)
            if member is not None and _has_state(member) and part.is_held:
                state[place] = _state_of(part, member, bits, decoded, filled, optimizer)
            place += 1
    return {"state": state, "param_groups": param_groups}


@torch.no_grad()
def join_masters(
    parts: Sequence[Sequence[Part]], groups: Sequence[Mapping[str, Any]], filled: Mapping[str, Tensor]
) -> bool:
    """Makes float32 parameters, which hold what a checkpoint has in bfloat16, the master weights of its remainders.

    Returns:
        Whether there were any, on any rank.
    """
    saved = {name: member for group in groups for name, member in group["parameters"].items()}
    joined = False
    for part in (part for of_group in parts for part in of_group if part.name in saved):
        if part.parameter.dtype == torch.float32 and "remainder" in saved[part.name]["state"]:
            values = local_of(part.parameter.detach())
            remainder = _local(filled[f"state.{part.name}.remainder"]).view(values.shape)
            values.copy_(join(values.bfloat16(), remainder))
            joined = True
    return joined


def check_names(parts: Sequence[Sequence[Part]], groups: Sequence[Mapping[str, Any]], frozen: Container[str]) -> None:
    """Raises ValueError where a checkpoint's parameters are not those of the optimizer.

    Those of the model that are `frozen` may be in one alone: the optimizer has no state of them, and the checkpoint
    none that it could not leave out.
    """
    saved = {name: member for group in groups for name, member in group["parameters"].items()}
    own = {part.name: tuple(part.shape) for of_group in parts for part in of_group}
    for name in sorted(own.keys() | saved.keys()):
        if name in frozen and (name not in saved or (name not in own and not _has_state(saved[name]))):
            continue
        mine, theirs = own.get(name, "nothing"), tuple(saved[name]["shape"]) if name in saved else "nothing"
        if mine != theirs:
            raise ValueError(
                f"{name}: the optimizer trains {mine} of that name, the checkpoint has {theirs}; a checkpoint of"
                " another model?"
            )


def _has_state(member: Mapping[str, Any]) -> bool:
    return bool(member["state"]) or member["step"] is not None


def _state_of(
    part: Part,
    member: Mapping[str, Any],
    bits: int,
    decoded: bool,
    filled: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> dict[str, Any]:
    """A part's state of the filled ranges, whose moments are of `bits`, or `decoded`."""
    tensors = {key: _local(filled[f"state.{part.name}.{key}"]) for key in member["state"]}
    shape = local_of(part.parameter).shape
    shapes = _shapes_apart(shape, optimizer)
    if not isinstance(optimizer, LowMemoryOptimizer) or part.parameter.dtype == torch.float32:
        tensors.pop("remainder", None)  # `join_masters` has it
    if decoded:
        before = _before(part, bits)
        blocks = torch.Size([before + shape.numel()])
        absmax = {key: tensors.pop(f"{key}_absmax", None) for key in list(tensors) if not key.endswith("_absmax")}
        for key, value in tensors.items():
            if key not in shapes and key != "remainder" and value.dtype != torch.float64:
                tensors[key] = decode(value, absmax[key], bits, key != "exp_avg_sq", blocks)[before:]
    state: dict[str, Any] = {
        key: value if _is_code(key, bits) and key not in shapes and not decoded else value.view(shapes.get(key, shape))
        for key, value in tensors.items()
    }
    return state if member["step"] is None else state | {"step": torch.tensor(member["step"])}


def _before(part: Part, bits: int) -> int:
    """How many elements of a part's first block of states are not the part's: at stage 3 rows may begin within one."""
    return part.first % BLOCK_SIZE[bits] if bits < 16 and local_of(part.parameter).numel() else 0


def _is_code(key: str, bits: int) -> bool:
    return key.endswith("_absmax") or (bits < 16 and key != "remainder")


def _tensors(state: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    return [(key, value) for key, value in state.items() if key != "step"]


def _shard(local: Tensor, key: str, part: Part, bits: int, optimizer: torch.optim.Optimizer) -> FlatShard:
    size = _size(part.shape, key, bits, optimizer)
    if key not in _shapes_apart(part.shape, optimizer):
        return FlatShard(local, part.first // _elements_in_one(key, bits), size)
    # Of rows, as many elements each, or of all rows together.
    first = part.first * size // max(1, part.shape.numel()) if local.numel() < size else 0
    return FlatShard(local, first, size)


def _size(shape: torch.Size, key: str, bits: int, optimizer: torch.optim.Optimizer) -> int:
    """How many elements a state of a parameter of that shape has."""
    shapes = _shapes_apart(shape, optimizer)
    return math.prod(shapes[key]) if key in shapes else -(-shape.numel() // _elements_in_one(key, bits))


def _shapes_apart(shape: torch.Size, optimizer: torch.optim.Optimizer) -> dict[str, tuple[int, ...]]:
    """Those of a parameter's states that are not of its elements."""
    return optimizer.float_states(shape) if isinstance(optimizer, LowMemoryOptimizer) else {}


def _local(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, FlatShard)
    return tensor.local


def _elements_in_one(key: str, bits: int) -> int:
    """How many of a parameter's elements one of the state's is of."""
    if key.endswith("_absmax"):
        return BLOCK_SIZE[bits]
    return 2 if bits == 4 and key != "remainder" else 1


def _to_json(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value
