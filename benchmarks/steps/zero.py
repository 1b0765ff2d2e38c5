"""A training step of a Llama of 50 million parameters on two ranks, float32: DistributedDataParallel and FSDP2 with
torch's fused AdamW, and `ShardedOptimizer`.

The second rank is a process of its own, which does what this one says; each has one thread. States in 8 bits are
shown too, which torch does not have.
"""

from __future__ import annotations

import atexit
import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from memkernels.bench import Benchmark, Case, Step
from memkernels.bench.llama import llama_config
from memkernels.bench.timer import Plan
from memkernels.optim import AdamW, ShardedOptimizer

RANKS = 2
PROVIDERS = ("ddp", "fsdp2", "stage1", "stage2", "stage3", "stage2-8bit")
# So small that every provider trains the same numbers throughout.
OPTIONS = {"lr": 1e-7}


def make_step(sizes: dict[str, int], provider: str) -> Callable[[], torch.Tensor]:
    """The provider's step on this rank."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(sizes))
    wrapped: torch.nn.Module = model
    if provider == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    elif provider == "fsdp2":
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    if provider in ("ddp", "fsdp2"):
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), **OPTIONS, fused=True)
    else:
        stage, _, bits = provider.removeprefix("stage").partition("-")
        bits = int(bits.removesuffix("bit") or 32)
        optimizer = ShardedOptimizer(model, AdamW, stage=int(stage), state_bits=bits, **OPTIONS)
    tokens = torch.randint(sizes["vocabulary"], (1, sizes["tokens"]))

    def step() -> torch.Tensor:
        loss = wrapped(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def join(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=300)
    )


def say(number: int) -> int:
    """What the first rank says, on every rank."""
    said = torch.tensor(number)
    dist.broadcast(said, 0)
    return int(said)


@functools.cache
def other_rank(sizes: tuple[tuple[str, int], ...]) -> None:
    """Starts the second rank, which ends with this process."""
    folder = tempfile.TemporaryDirectory()
    store = str(Path(folder.name) / "store")
    words = [store, *(f"{name}={value}" for name, value in sizes)]
    process = subprocess.Popen([sys.executable, __file__, *words], env=os.environ | {"OMP_NUM_THREADS": "1"})
    join(0, store)

    def end() -> None:
        say(-1)
        process.wait(timeout=60)
        folder.cleanup()

    atexit.register(end)


def obey(store: str, sizes: dict[str, int]) -> None:
    """The second rank: the steps of the providers that the first one names."""
    join(1, store)
    step = functools.cache(functools.partial(make_step, sizes))
    while (number := say(0)) >= 0:
        made = step(PROVIDERS[number // 2])
        if number % 2:
            made()


def setup(case: Case, provider: str) -> Step:
    other_rank(tuple(case.sizes.items()))
    number = PROVIDERS.index(provider)
    say(2 * number)
    step = make_step(dict(case.sizes), provider)

    def forward() -> torch.Tensor:
        torch.set_num_threads(1)
        say(2 * number + 1)
        return step()

    return Step(forward)


SIZES = {
    "width": 512,
    "feed_forward": 1536,
    "layers": 10,
    "q_heads": 8,
    "k_heads": 8,
    "vocabulary": 16384,
    "tokens": 512,
}

benchmark = Benchmark(
    op="zero",
    cases=(Case("d512-f1536-L10-V16384-T512-2 ranks", torch.float32, SIZES),),
    providers=PROVIDERS,
    setup=setup,
    baseline="ddp",
    modes=("forward",),
    plan=Plan(budget=0, least=4, warmup=1),
)

if __name__ == "__main__":
    obey(sys.argv[1], {name: int(value) for name, value in (word.split("=") for word in sys.argv[2:])})
