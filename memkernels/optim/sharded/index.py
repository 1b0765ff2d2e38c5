"""What a checkpoint's `index.json` says: groups, steps and other names, and a checksum of every file and of itself."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

from memkernels.optim.codes import STATE_BITS
from memkernels.optim.sharded.states import DTYPES

INDEX = "index.json"
VERSION = 1
_CHECKSUM_KEY = ', "crc32": '


def index_text(index: dict[str, Any]) -> str:
    """An index as JSON, which ends with the CRC32 of what is before it."""
    text = json.dumps(index)[:-1] + _CHECKSUM_KEY
    return f"{text}{zlib.crc32(text.encode())}}}"


def read_index(path: Path) -> dict[str, Any]:
    """The index of the checkpoint in folder `path`.

    Raises:
        ValueError: it is missing, damaged, of another version, or not what `save_checkpoint` writes.
    """
    try:
        text = (path / INDEX).read_text()
        index = json.loads(text)
        content, key, checksum = text.rpartition(_CHECKSUM_KEY)
        if checksum != f"{zlib.crc32((content + key).encode())}}}":
            raise ValueError("its checksum does not match")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path / INDEX}: not to be read as a checkpoint's: {error}") from error
    if not isinstance(index, dict) or index.get("version") != VERSION:
        raise ValueError(f"{path / INDEX}: expected version {VERSION} of a checkpoint.")
    for key, kind in (("groups", list), ("aliases", dict), ("files", dict)):
        if not isinstance(index.get(key), kind):
            raise ValueError(f"{path / INDEX}: {key}: expected a {kind.__name__}, got {index.get(key)!r}.")
    if "extra" not in index:
        raise ValueError(f"{path / INDEX}: extra: expected a value, got nothing.")
    for number, group in enumerate(index["groups"]):
        if not _is_group(group):
            raise ValueError(f"{path / INDEX}: groups[{number}]: not as save_checkpoint writes it.")
    return index


def _is_group(group: Any) -> bool:
    if not isinstance(group, dict) or not all(isinstance(group.get(key), dict) for key in ("options", "parameters")):
        return False
    return group["options"].get("state_bits", 32) in STATE_BITS and all(map(_is_member, group["parameters"].values()))


def _is_member(member: Any) -> bool:
    if not isinstance(member, dict) or not {"shape", "step", "state"} <= member.keys():
        return False
    shape, step, state = member["shape"], member["step"], member["state"]
    return (
        isinstance(shape, list)
        and all(isinstance(size, int) for size in shape)
        and isinstance(step, int | float | None)
        and isinstance(state, dict)
        and all(isinstance(dtype, str) and dtype in DTYPES for dtype in state.values())
    )


def checksum_of(path: Path) -> int:
    """The CRC32 of a file."""
    checksum = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
