"""`python -m memkernels plan`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from memkernels.adapters.base import BASES
from memkernels.integrations.patching import RECOMPUTE
from memkernels.optim.checks import ROUNDINGS
from memkernels.optim.codes import STATE_BITS
from memkernels.planner.optimizers import OPTIMIZERS
from memkernels.planner.search import DTYPES, OFFLOAD, PLAIN, STAGES, plan

_MODULES = ("transformers", "rich", "matplotlib")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `plan` to `parser`: those of `memkernels.plan`."""
    parser.add_argument("--model", required=True, help="a name on the hub, a folder, or a config.json")
    parser.add_argument("--memory", required=True, help="of each rank, as 24GB or 80GiB")
    parser.add_argument("--seq", type=int, required=True, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=1, help="rows of a step, on each rank")
    parser.add_argument("--ranks", type=int, default=1, help="ranks of data parallelism")
    parser.add_argument("--lora", type=int, help="rank of adapters; without it every parameter is trained")
    parser.add_argument("--base", choices=[base for base in BASES if base], help="storage of what carries adapters")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the parameters")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    parser.add_argument("--rounding", choices=ROUNDINGS, default="stochastic", help="of bfloat16 parameters")
    parser.add_argument("--reduce-dtype", choices=DTYPES, help="of gradients between ranks; the parameters' by default")
    tried = parser.add_argument_group("techniques", "each is tried in every way unless it is given")
    tried.add_argument(
        "--recompute", choices=(*RECOMPUTE, PLAIN), help=f"as memkernels.patch takes it; {PLAIN}: no patch"
    )
    tried.add_argument("--offload", choices=OFFLOAD, help="where activations go; host: from a GPU")
    tried.add_argument("--offload-states", choices=OFFLOAD, help="where the optimizer's states are between steps")
    tried.add_argument("--offload-gradients", choices=OFFLOAD, help="where gradients are until the step")
    tried.add_argument("--stage", type=int, choices=STAGES, help="of ZeRO")
    tried.add_argument("--state-bits", type=int, choices=STATE_BITS, help="of the optimizer's states")
    tried.add_argument("--micro-batch", type=int, help="rows computed at a time")
    tried.add_argument("--step-in-backward", action=argparse.BooleanOptionalAction, help="optim.step_in_backward")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="whose code is planned for; cuda where there is one")
    parser.add_argument("--output", type=Path, default=Path("plan.png"), help="the plot")


def run(args: argparse.Namespace) -> int:
    """Prints the table and draws it; returns 1 where nothing fits, 2 where no plan can be made."""
    if missing := [module for module in _MODULES if importlib.util.find_spec(module) is None]:
        return _refuse(f"{', '.join(missing)} missing: pip install 'memkernels[plan]'")
    options = {name: value for name, value in vars(args).items() if name not in ("run", "output")}
    try:
        found = plan(**options)
    except (OSError, TypeError, ValueError) as error:
        return _refuse(str(error))
    print(found)
    try:
        print(found.save_plot(args.output))
    except (OSError, ValueError) as error:  # no such folder, or no format of that name
        return _refuse(f"--output: {error}")
    return int(found.best is None)


def _refuse(message: str) -> int:
    print(f"plan: {message}", file=sys.stderr)
    return 2
