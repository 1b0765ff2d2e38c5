"""Trains a small language model on several ranks, and goes on from its last checkpoint on more or fewer of them.

    pip install --no-build-isolation .
    torchrun --nproc-per-node 2 examples/train_zero.py --steps 200
    torchrun --nproc-per-node 3 examples/train_zero.py --steps 400  # goes on at step 200

It reads Python's standard library byte by byte. Each step has one batch whatever the number of ranks, of which each
rank has its share, so that the losses are the same too. AdamW's states, in 8 bits, and with `--stage 2` the gradients
are divided among the ranks. A rank that dies ends the others with an error; started again, they go on from the last
checkpoint, on fewer ranks too. The number of ranks divides the batch's 24 rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from switch_model import Shape, SwitchLanguageModel

from memkernels.demo.data import standard_library, windows
from memkernels.optim import AdamW, RankFailure, ShardedOptimizer, load_checkpoint, save_checkpoint

BATCH, TOKENS = 24, 128


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains and prints losses; returns 1 where another rank failed, 2 where it cannot run."""
    parser = argparse.ArgumentParser(description="Train a small language model on several ranks (ZeRO).")
    parser.add_argument("--steps", type=int, default=200, help="the last step")
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--stage", type=int, default=2, choices=(1, 2), help="of ZeRO")
    parser.add_argument("--output", type=Path, default=Path("demo/zero"), help="folder of the checkpoints")
    args = parser.parse_args(arguments)
    if not dist.is_torchelastic_launched():
        print("train_zero: start it by torchrun --nproc-per-node 2 examples/train_zero.py", file=sys.stderr)
        return 2
    dist.init_process_group("gloo")
    try:
        train(args.steps, args.every, args.stage, args.output)
    except RankFailure as failure:
        print(f"train_zero: rank {dist.get_rank()}: {failure}", file=sys.stderr)
        return 1
    dist.destroy_process_group()
    return 0


def train(steps: int, every: int, stage: int, output: Path, shape: Shape | None = None) -> None:
    """From the last checkpoint in `output`, where there is one, to step `steps`."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if BATCH % ranks:
        raise ValueError(f"the batch of {BATCH} does not fall to {ranks} ranks in equal parts")
    text, _ = standard_library()
    torch.manual_seed(0)
    model = SwitchLanguageModel(shape or Shape(), None)
    optimizer = ShardedOptimizer(model, AdamW, stage=stage, lr=1e-3, state_bits=8)
    first = 0
    if saved := sorted(output.glob("step*")):
        first = load_checkpoint(saved[-1], model, optimizer)["step"]
    for step in range(first, steps):
        tokens = windows(text, BATCH, TOKENS + 1, seed=step)[rank::ranks]
        loss, _ = model(tokens)
        loss.backward()
        optimizer.step(max_norm=1.0)
        mean = loss.detach() / ranks
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step + 1}: loss {mean.item():.4f}", flush=True)
        if (step + 1) % every == 0 or step + 1 == steps:
            output.mkdir(parents=True, exist_ok=True)
            save_checkpoint(output / f"step{step + 1:06}", model, optimizer, extra={"step": step + 1})


if __name__ == "__main__":
    raise SystemExit(main())
