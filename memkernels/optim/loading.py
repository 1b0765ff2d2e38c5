"""A saved state on its way into an optimizer: checked and converted before anything is changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from memkernels.optim.checks import check_shared
from memkernels.optim.codes import BLOCK_SIZE, STATE_BITS, decode, encode
from memkernels.optim.local import as_parameter, local_of

if TYPE_CHECKING:
    from memkernels.optim.optimizer import LowMemoryOptimizer

# How an optimizer keeps its states: its own choice, whatever a checkpoint was made with.
STORAGE = ("state_bits", "rounding", "seed")
# What torch's optimizers have beside hyperparameters.
_TORCH_ONLY = ("amsgrad", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay")


class Loaded:
    """A parameter's state behind a type that torch's `load_state_dict` does not cast to the parameter's dtype."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state


def prepare(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
    """A hook of a `LowMemoryOptimizer`'s `load_state_dict`: the groups and states with its own storage."""
    optimizer = cast("LowMemoryOptimizer", optimizer)
    own, saved = optimizer.param_groups, state_dict["param_groups"]
    if [len(group["params"]) for group in own] != [len(group["params"]) for group in saved]:
        return None  # torch says what does not fit
    groups, states = [], {}
    for number, (group, theirs) in enumerate(zip(own, saved, strict=True)):
        if theirs.get("amsgrad"):
            raise ValueError(f"param_groups[{number}]: amsgrad=True, whose maxima have no place here.")
        if theirs.get("decoupled_weight_decay") is False and theirs["weight_decay"]:
            raise ValueError(
                f"param_groups[{number}]: a weight decay within the gradient, as torch.optim.Adam has it; here it is"
                " decoupled."
            )
        kept = {key: value for key, value in theirs.items() if key not in _TORCH_ONLY}
        own_only = {key: group[key] for key in optimizer.not_in_torch}
        groups.append(own_only | kept | {key: group[key] for key in STORAGE})
        missing = sorted(set(optimizer.defaults) - set(groups[-1]) - set(_TORCH_ONLY))  # which a load adds to defaults
        if missing:
            raise ValueError(
                f"param_groups[{number}]: expected {', '.join(missing)}; a checkpoint of another optimizer?"
            )
        optimizer._check_options(groups[-1])
        check_shared(groups[-1])
        for key, param in zip(theirs["params"], group["params"], strict=True):
            if key in state_dict["state"]:
                name = f"state[{key}]"
                states[key] = Loaded(_converted(name, optimizer, param, state_dict["state"][key], theirs, group))
    return state_dict | {"param_groups": groups, "state": states}


def _converted(
    name: str, optimizer: LowMemoryOptimizer, param: Tensor, saved: dict[str, Any], theirs: dict, group: dict
) -> dict[str, Any]:
    """A parameter's state as `group` keeps it, from one that a group `theirs` kept."""
    own = local_of(param)
    bits, saved_bits = group["state_bits"], theirs.get("state_bits", 32)
    if saved_bits not in STATE_BITS:
        raise ValueError(f"{name}: state_bits: expected one of {STATE_BITS}, got {saved_bits!r}.")
    step = _entry(name, saved, "step") if optimizer.saves_step else saved.get("step", 1.0)
    state: dict[str, Any] = {"step": torch.tensor(float(step))}
    moments, apart = optimizer.moments(group | theirs), optimizer.float_states(own.shape)
    known = {"step", "remainder", *apart, *(f"{key}{of}" for key, _ in moments for of in ("", "_absmax"))}
    if moments and not saved.keys() <= known:  # without moments there may be some of an earlier momentum
        raise ValueError(f"{name}: expected no {min(saved.keys() - known)!r}; a checkpoint of another optimizer?")
    for key, signed in moments:
        stored, absmax = _local_entry(name, saved, key), None
        expected = own.shape
        if saved_bits < 16:
            expected = torch.Size([own.numel() if saved_bits == 8 else -(-own.numel() // 2)])
            absmax = _local_entry(name, saved, f"{key}_absmax")
            _check_shape(f"{name}[{key}_absmax]", absmax, torch.Size([-(-own.numel() // BLOCK_SIZE[saved_bits])]))
        _check_shape(f"{name}[{key}]", stored, expected)
        stored = stored.to(param.device)
        absmax = None if absmax is None else absmax.to(param.device, torch.float32)
        if saved_bits != bits:
            stored, absmax = encode(decode(stored, absmax, saved_bits, signed, own.shape), bits, signed)
        dtype = {32: torch.float32, 16: torch.bfloat16}.get(bits, torch.uint8)
        state[key] = stored.to(dtype).clone(memory_format=torch.contiguous_format)
        if absmax is None:
            state[key] = as_parameter(state[key], param)
        else:
            state[f"{key}_absmax"] = absmax.clone()
    for key, shape in apart.items():
        value = _entry(name, saved, key)
        _check_shape(f"{name}[{key}]", value, torch.Size(shape))
        state[key] = value.to(param.device, torch.float32).clone(memory_format=torch.contiguous_format)
    if "remainder" in saved and param.dtype == torch.float32:
        raise ValueError(
            f"{name}: remainder: 16 bits of weights, for which a float32 parameter has no place; load_checkpoint joins"
            " them and the weights."
        )
    if group["rounding"] == "remainder" and param.dtype == torch.bfloat16:
        remainder = local_of(saved.get("remainder", torch.zeros(own.shape, dtype=torch.int16)))
        _check_shape(f"{name}[remainder]", remainder, own.shape)
        remainder = remainder.to(param.device, torch.int16).clone(memory_format=torch.contiguous_format)
        state["remainder"] = as_parameter(remainder, param)
    return state


def _entry(name: str, saved: dict[str, Any], key: str) -> Any:
    if key not in saved:
        raise ValueError(f"{name}: expected {key!r}, got {sorted(saved)}; a checkpoint of another optimizer?")
    return saved[key]


def _local_entry(name: str, saved: dict[str, Any], key: str) -> Any:
    entry = _entry(name, saved, key)
    return local_of(entry) if isinstance(entry, Tensor) else entry


def _check_shape(name: str, tensor: Any, shape: torch.Size) -> None:
    if not isinstance(tensor, Tensor) or tensor.shape != shape:
        got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {got}; a checkpoint of another model?")
