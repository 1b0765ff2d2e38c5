"""The safetensors files of a Hugging Face model's directory: which tensor is in which, read one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Shards:
    """By key, the file that holds the tensor, and its shape and dtype, by safetensors' name: F32, BF16."""

    listing: Path
    files: dict[str, Path]
    shapes_and_dtypes: dict[str, tuple[tuple[int, ...], str]]

    @contextmanager
    def read(self, key: str) -> Iterator[Tensor]:
        """The tensor in the file's memory map, which ends with the context, so that its pages are given back.

        It must not be kept.
        """
        with _opened(self.files[key]) as file:
            yield file.get_tensor(key)


def find_shards(directory: Path) -> Shards:
    """Of model.safetensors.index.json, or of the one model.safetensors, with every file's header checked.

    Raises:
        FileNotFoundError: there is neither, or a file that the index names is missing.
        ValueError: a file is damaged or cut off, or lacks a tensor that the index says it has; file and key are named.
    """
    index = directory / INDEX
    if index.is_file():
        return _checked(index, _weight_map(index))
    single = directory / SINGLE
    if not single.is_file():
        raise FileNotFoundError(f"{directory}: it has neither {SINGLE} nor {INDEX}.")
    header = _header(single)
    return Shards(single, dict.fromkeys(header, single), header)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weights = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{index}: expected JSON with a weight_map: {error!r}.") from None
    for key, name in weights.items() if isinstance(weights, dict) else [("weight_map", weights)]:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index}: {key}: expected the name of a file, got {name!r}.")
    return weights


def _checked(index: Path, weights: dict[str, str]) -> Shards:
    headers: dict[str, tuple[tuple[int, ...], str]] = {}
    for name in sorted(set(weights.values())):
        path = index.parent / name
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file, though {index.name} names it.")
        header = _header(path)
        for key, of in weights.items():
            if of == name and key not in header:
                raise ValueError(f"{path}: {key}: missing, though {index.name} says that the file has it.")
        headers |= {key: of for key, of in header.items() if weights.get(key) == name}
    return Shards(index, {key: index.parent / name for key, name in weights.items()}, headers)


def _header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    with _opened(path) as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  it is no mapping
        return {key: (tuple(of.get_shape()), of.get_dtype()) for key, of in slices.items()}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated, or no safetensors file: {error}") from None
