"""The command line: `python -m memkernels demo | info | bench | plan | profile`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from memkernels import __version__, info
from memkernels.bench import cli as bench
from memkernels.demo import cli as demo
from memkernels.planner import cli as plan
from memkernels.profiling import cli as profile

_COMMANDS = {
    "demo": (demo, "train a small Llama as transformers has it and patched: memory, time and loss of both"),
    "info": (info, "what each op will run on here, and why not where something is missing"),
    "bench": (bench, "measure ops and training steps against eager PyTorch and others"),
    "plan": (plan, "which techniques train a model within a memory limit, and what each costs"),
    "profile": (profile, "run a script, and draw the memory of one of its training steps by what it is for"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 where a result is wrong, 2 where it cannot run."""
    parser = argparse.ArgumentParser(prog="python -m memkernels", description="Training in less memory.")
    parser.add_argument("--version", action="version", version=f"memkernels {__version__}")
    commands = parser.add_subparsers(required=True, metavar="{" + ",".join(_COMMANDS) + "}")
    for name, (module, summary) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    parsed = parser.parse_args(arguments)
    return parsed.run(parsed)
