"""`python -m memkernels profile -- script.py`: the memory of one training step of a script."""

from __future__ import annotations

import argparse
import runpy
import sys
import threading
from pathlib import Path
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

from memkernels.memory_size import format_bytes
from memkernels.profiling.recording import Output, Recording


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [--step N] [--output PATH] -- script.py [argument ...]"
    parser.add_argument("--step", type=int, default=2, help="which call of optimizer.step() ends the step (default 2)")
    parser.add_argument("--output", default="memory", help="writes PATH.png and PATH.html (default memory)")
    parser.add_argument("script", help="the training script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")


def run(args: argparse.Namespace) -> int:
    """Runs the script to its end; returns 2 where it cannot be run or made too few steps."""
    if args.step < 1:
        print(f"profile: --step: expected 1 or more, got {args.step}.", file=sys.stderr)
        return 2
    if not Path(args.script).is_file():
        print(f"profile: {args.script} is not a file.", file=sys.stderr)
        return 2
    try:
        output = Output(args.output)
    except ImportError as error:
        print(f"profile: {error}: pip install 'memkernels[plot]'", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"profile: --output: {str(error).removeprefix('path: ')}", file=sys.stderr)
        return 2
    sys.argv = [args.script, *args.arguments]
    sys.path.insert(0, str(Path(args.script).resolve().parent))
    step = _Step(output, args.step)
    try:
        with step:
            runpy.run_path(args.script, run_name="__main__")
    except SystemExit as ended:  # as by sys.exit(main()) at a script's end
        if step.done:
            raise
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    if not step.done:
        print(
            f"profile: step {args.step} was not reached: {args.script} called optimizer.step() {step.count} times in"
            " the thread that is recorded. Steps without such a call are recorded by memkernels.profile() around them.",
            file=sys.stderr,
        )
        return 2
    return 0


class _Step:
    """Records from the end of one optimizer's step to the end of the next, the one of that number.

    Of steps in several threads those of one count, the first that steps: a recording is of one thread.
    """

    def __init__(self, output: Output, number: int):
        self._output = output
        self._number = number
        self._thread = threading.get_ident() if number == 1 else None
        self._lock = threading.Lock()
        self.count = 0

    @property
    def done(self) -> bool:
        return self.count >= self._number

    def __enter__(self) -> _Step:
        self._recording = Recording()
        self._handle = register_optimizer_step_post_hook(self._after_step)  # after those of the recording
        if self._number == 1:
            self._recording.begin()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._handle.remove()
        if self._recording.active:
            self._recording.end()
        self._recording.close()

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        with self._lock:
            self._thread = self._thread or threading.get_ident()
        if threading.get_ident() != self._thread:
            return
        self.count += 1
        if self.count == self._number - 1:
            self._recording.begin()
        elif self.count == self._number:
            self._recording.end()
            found = self._recording.timelines()
            self._output.save(found)
            print(f"profile: peak of step {self._number} on {found[0].device}: {format_bytes(found[0].peak)}")
            print(f"profile: {self._output.png} and {self._output.page}", flush=True)
