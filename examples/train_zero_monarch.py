"""Trains what train_zero.py trains, on ranks that are actors of Monarch in place of torchrun's processes.

    pip install --no-build-isolation . && pip install torchmonarch
    python examples/train_zero_monarch.py --ranks 2 --steps 200
    python examples/train_zero_monarch.py --ranks 3 --steps 400  # goes on at step 200

`ShardedOptimizer` needs a process group alone, whoever starts its ranks: each actor joins one, and the endpoint is the
training loop. On one machine; the checkpoints are those of train_zero.py.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from monarch.actor import Actor, ActorError, current_rank, endpoint, this_host


class Rank(Actor):
    """A rank of a process group that meets at the file `store`."""

    def __init__(self, ranks: int, store: str, examples: str) -> None:
        sys.path.insert(0, examples)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=current_rank().rank, world_size=ranks)

    @endpoint
    def train(self, steps: int, every: int, stage: int, output: str) -> None:
        """From the last checkpoint in `output` to step `steps`."""
        import train_zero

        train_zero.train(steps, every, stage, Path(output))


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains; returns 1 where a rank failed."""
    parser = argparse.ArgumentParser(description="Train a small language model on actors of Monarch (ZeRO).")
    parser.add_argument("--ranks", type=int, default=2, help="actors, on this machine")
    parser.add_argument("--steps", type=int, default=200, help="the last step")
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--stage", type=int, default=2, choices=(1, 2), help="of ZeRO")
    parser.add_argument("--output", type=Path, default=Path("demo/zero"), help="folder of the checkpoints")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        processes = this_host().spawn_procs(per_host={"ranks": args.ranks})
        ranks = processes.spawn("ranks", Rank, args.ranks, f"{folder}/store", str(Path(__file__).parent))
        try:
            ranks.train.call(args.steps, args.every, args.stage, str(args.output.absolute())).get()
        except ActorError as failure:
            print(f"train_zero_monarch: {failure}", file=sys.stderr)
            return 1
        finally:
            processes.stop().get()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
