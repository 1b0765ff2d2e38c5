"""Files that are the old one or the new one, and never a part."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` for a new file beside `path` and moves it there; where it fails, `path` is as it was."""
    write_together({path: write})


def write_together(writes: Mapping[Path, Callable[[Path], object]]) -> None:
    """`write_atomically` of several files, of which the last stands for all: where it is, they are of one call.

    Once all are written it is taken away, the others are moved to their places, and it is moved to its own: of a
    process that ends in between is left no file of the last one's name.
    """
    *others, last = writes
    staged: dict[Path, str] = {}
    try:
        for path, write in writes.items():
            handle, staged[path] = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            os.close(handle)
            write(Path(staged[path]))
            with open(staged[path], "rb") as file:
                os.fsync(file.fileno())
            os.chmod(staged[path], 0o644)
        if others:
            last.unlink(missing_ok=True)
        for path in writes:
            os.replace(staged[path], path)
            del staged[path]
    except BaseException:
        for name in staged.values():
            os.unlink(name)
        raise
