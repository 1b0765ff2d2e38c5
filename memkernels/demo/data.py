"""Text that every machine has: the sources of Python's standard library, as bytes."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor


def standard_library(folder: Path | None = None) -> tuple[Tensor, Tensor]:
    """Bytes of the top-level modules, uint8: those to train on and those held out.

    Raises:
        FileNotFoundError: as `standard_library_files`.
    """
    train, held_out = standard_library_files(folder)
    return _read(train), _read(held_out)


def standard_library_files(folder: Path | None = None, *, every: int = 20) -> tuple[list[Path], list[Path]]:
    """The top-level modules in order of names: those to train on, and the first of each `every`, which is held out.

    Raises:
        FileNotFoundError: the folder has too few sources; some distributions of Python ship compiled ones only.
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    files = sorted(folder.glob("*.py"))
    if len(files) < every:
        raise FileNotFoundError(f"the sources of Python's standard library are not in {folder}")
    held_out = files[::every]
    return [path for path in files if path not in held_out], held_out


def windows(text: Tensor, count: int, tokens: int, seed: int) -> Tensor:
    """`count` windows of `tokens` bytes from anywhere in the text, (count, tokens) int64; the same for one seed."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - tokens + 1, (count, 1), generator=generator)
    return text[starts + torch.arange(tokens)].long()


def _read(files: list[Path]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8)
