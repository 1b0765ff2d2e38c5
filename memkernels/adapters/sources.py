"""The keys of a Hugging Face model's files that make each of its tensors, as transformers renames and packs them."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from memkernels.adapters.shards import Shards


@dataclass(frozen=True)
class Source:
    """Where the files have a tensor of the model.

    `key`: its own or, of `experts`, the first. `experts`, of a tensor (E, out, in) that the files have in matrices: the
    keys of each expert's, which lie one below the other.
    """

    key: str
    experts: tuple[tuple[str, ...], ...] = ()


def find_sources(model: nn.Module, shards: Shards) -> dict[str, Source]:
    """By name, the tensors of the model that the files have.

    Raises:
        ValueError: an expert's matrix is missing or one too many, or transformers makes a tensor of the files' by
            anything but a new name or by packing experts; file and key are named.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not isinstance(model, modeling.PreTrainedModel):
        return {key: Source(key) for key in shards.files}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [of for of in transforms if isinstance(of, WeightRenaming)]
    converters = [of for of in transforms if isinstance(of, WeightConverter)]
    tensors = model.state_dict(keep_vars=True)
    sources: dict[str, Source] = {}
    matrices: dict[str, dict[tuple[str, int], str]] = {}
    patterns: dict[str, Sequence[str]] = {}
    for key in shards.files:
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, tensors)
        if name not in tensors:  # as transformers has it: the name may be the model's already
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, tensors)
        if name not in tensors:
            continue
        if pattern is None:
            sources[name] = Source(key)
            continue
        converter = next(of for of in converters if pattern in of.source_patterns)
        number = re.search(r"\.(\d+)\.(?!.*\.\d+\.)", key)
        if number is None or not _packs_experts(converter):
            by = ", ".join(type(of).__name__ for of in converter.operations)
            raise ValueError(f"{shards.files[key]}: {key}: load_base does not make {name} of it, by {by}.")
        patterns[name] = converter.source_patterns
        matrices.setdefault(name, {})[pattern, int(number[1])] = key
    for name, keys in matrices.items():
        sources[name] = _packed(name, tensors[name].shape[0], patterns[name], keys, shards)
    return sources


def _packs_experts(converter: Any) -> bool:
    """Whether it stacks the experts' matrices, those of one expert below each other."""
    kinds = [(type(of).__name__, getattr(of, "dim", None)) for of in converter.operations]
    stack = ("MergeModulelist", 0)
    return kinds == [stack, ("Concatenate", 1)] or (kinds == [stack] and len(converter.source_patterns) == 1)


def _packed(
    name: str, num_experts: int, patterns: Sequence[str], keys: dict[tuple[str, int], str], shards: Shards
) -> Source:
    for (_, expert), key in keys.items():
        if expert >= num_experts:
            raise ValueError(f"{shards.files[key]}: {key}: {name} has {num_experts} experts.")
    for expert in range(num_experts):
        for pattern in patterns:
            if (pattern, expert) not in keys:
                raise ValueError(f"{shards.listing}: {name}: {pattern.replace('*', str(expert))}: missing.")
    experts = tuple(tuple(keys[pattern, expert] for pattern in patterns) for expert in range(num_experts))
    return Source(experts[0][0], experts)
