"""`profile`: records a stretch of a program, and draws its memory."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from memkernels.profiling.page import write
from memkernels.profiling.png import draw
from memkernels.profiling.record import read
from memkernels.profiling.timeline import Timeline, timelines
from memkernels.profiling.watch import Watch


class Recording:
    """The profiler and the watch over one stretch, from `begin` to `end`. Neither may be called twice."""

    def __init__(self) -> None:
        self._watch = Watch()
        self.active = False

    def begin(self) -> None:
        if torch.autograd._profiler_enabled():  # which would record nothing more, without an error
            raise RuntimeError("profile: another profiler runs, and there can be one at a time.")
        self.active = True
        self._profiler = torch.autograd.profiler.profile(profile_memory=True)
        self._profiler.__enter__()
        try:
            self._watch.begin()
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        self.active = False
        self._watch.end()
        self._profiler.__exit__(None, None, None)

    def timelines(self) -> list[Timeline]:
        """Of each device, the one with the highest peak first."""
        results = self._profiler.kineto_results
        assert results is not None
        return timelines(read(results.experimental_event_tree()))

    def close(self) -> None:
        self._watch.close()


class Output:
    """The PNG and the page of a recording, at `path.png` and `path.html`.

    Raises:
        ImportError: matplotlib is missing.
        OSError: path names no file, or its folder does not exist or cannot be written to.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        import matplotlib  # noqa: F401

        path = Path(path)
        if path.name in ("", ".."):
            raise IsADirectoryError(f"path: expected the beginning of two files' names, got {os.fspath(path)!r}.")
        folder = path.absolute().parent
        if not folder.is_dir():
            raise FileNotFoundError(f"path: {folder} is not a folder.")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"path: {folder} cannot be written to.")
        self.png, self.page = (path.with_name(path.name + suffix) for suffix in (".png", ".html"))

    def save(self, found: list[Timeline]) -> None:
        draw(found, self.png)
        write(found, self.page)


class profile:
    """Records the memory of what runs within it, a training step say, over time and by what it is for::

        with memkernels.profile("step") as recorded:  # step.png and step.html
            model(**batch).loss.backward()
            optimizer.step()
        recorded.timelines[0].peak  # bytes

    Categories: parameters and buffers; optimizer states; gradients of parameters; activations, which autograd saves and
    which are still there when backward begins, or are computed again within it; and the rest: inputs, gradients of
    activations, and what ops need for themselves. What `memkernels.offload` holds in host memory and on disk is a line
    beside the stack.

    It is made from the allocators' own events, by torch.profiler, so that memory that an op takes and frees before it
    returns is seen, as it would not be from the op's results. What an address is for comes from hooks, as marks among
    those events. Of what exists when it is entered, all tensors that Python holds are seen. Memory of other allocators
    is not: of libraries, of kernels' threads, of offload's staging blocks. Nor is that of other threads of Python.

    Args:
        path: the PNG and the page are written to `path.png` and `path.html` at a normal end; None writes neither.
            The PNG needs matplotlib.

    Attributes:
        timelines: after it, one for each device, the one with the highest peak first.

    Raises:
        ImportError: path is given and matplotlib is missing.
        OSError: path names no file, or its folder does not exist or cannot be written to.
        RuntimeError: when entered, another profiler runs.
    """

    timelines: list[Timeline]

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self._output = None if path is None else Output(path)

    def __enter__(self) -> profile:
        self._recording = Recording()
        try:
            self._recording.begin()
        except BaseException:
            self._recording.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        recording = self._recording
        del self._recording
        recording.end()
        recording.close()
        if kind is None:
            self.timelines = recording.timelines()
            if self._output is not None:
                self._output.save(self.timelines)
