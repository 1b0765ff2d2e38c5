"""A folder for what must be on a disk."""

import tempfile
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def on_disk(folder):
    """The folder, or one beside the tests where it is in memory."""
    from memkernels._runtime import SpillFile

    if not SpillFile(str(folder), threads=1).in_memory:
        yield folder
        return
    with tempfile.TemporaryDirectory(dir=Path(__file__).parents[1]) as other:
        yield Path(other)
