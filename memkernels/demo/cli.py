"""`python -m memkernels demo`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from memkernels.bench import machine
from memkernels.demo import report
from memkernels.demo.data import standard_library
from memkernels.demo.llama import Settings, measure_job, train_job
from memkernels.demo.requirements import unmet
from memkernels.demo.run import run_both
from memkernels.integrations.patching import RECOMPUTE

# Nats a byte. In float32 two runs differ by roundings, which training amplifies; a wrong gradient differs by more.
_LARGEST_DIFFERENCE = 0.02


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `demo` to `parser`."""
    parser.add_argument("--steps", type=int, default=Settings.steps, help="training steps of each run")
    parser.add_argument("--tokens", type=int, default=Settings.tokens, help="bytes of text in a step")
    parser.add_argument("--layers", type=int, default=Settings.layers, help="decoder layers")
    parser.add_argument("--recompute", choices=RECOMPUTE, default="layer", help="as memkernels.patch takes it")
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder of the plots")


def run(args: argparse.Namespace) -> int:
    """Trains, prints and draws; returns 1 where the two runs learn differently, 2 where they cannot run."""
    for option, least in (("steps", 1), ("tokens", 2), ("layers", 1)):  # a byte foretells the next
        if getattr(args, option) < least:
            return _refuse(f"--{option}: expected at least {least}, got {getattr(args, option)}")
    if reason := unmet(("transformers", "tqdm", "matplotlib"), "hf,plot"):
        return _refuse(reason)
    try:
        text, held_out = standard_library()
    except FileNotFoundError as error:
        return _refuse(str(error))
    if args.tokens > len(held_out):
        return _refuse(f"--tokens: expected at most {len(held_out)}, the bytes of text held out, got {args.tokens}")

    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return _refuse(f"--output: {error}")
    settings = dataclasses.asdict(Settings(None, steps=args.steps, tokens=args.tokens, layers=args.layers))
    machine.set_threads()
    print(f"A byte-level Llama learns Python's standard library, {args.tokens} of {len(text)} bytes a step.")
    print(machine.describe(), flush=True)
    try:
        plain, patched = run_both(train_job, measure_job, settings, args.recompute)
    except RuntimeError as error:
        return _refuse(f"a training run failed: {error}")
    parameters = plain.training.parameters / 1e6
    print(f"\n{parameters:.1f} million parameters in float32; memkernels.patch(model, recompute={args.recompute!r})\n")
    print(report.table(plain, patched), "\n")
    for path in report.draw(plain, patched, args.output):
        print(path)
    difference = report.largest_difference(plain, patched)
    if not difference <= _LARGEST_DIFFERENCE:
        print(f"demo: the losses differ by {difference:.3g}, more than roundings do", file=sys.stderr)
        return 1
    return 0


def _refuse(message: str) -> int:
    print(f"demo: {message}", file=sys.stderr)
    return 2
