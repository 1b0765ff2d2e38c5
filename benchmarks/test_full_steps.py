"""`pytest benchmarks --benchmark-only`: full steps under pytest-benchmark, to compare one machine's commits.

Its figures are not interleaved; ratios of providers come from `python -m memkernels.bench`.
"""

from pathlib import Path

import pytest
import torch

from memkernels.bench.machine import set_threads
from memkernels.bench.registry import find, load

LOADED = [loaded for path in find(Path(__file__).parent).values() if "full" in (loaded := load(path)).modes]
CASES = [(loaded, case, provider) for loaded in LOADED for case in loaded.cases for provider in loaded.providers]
IDS = [f"{loaded.op}-{case.label}-{provider}" for loaded, case, provider in CASES]


@pytest.mark.parametrize(("loaded", "case", "provider"), CASES, ids=IDS)
def test_full_step(benchmark, loaded, case, provider):
    set_threads()
    torch.manual_seed(0)
    torch.compiler.reset()
    benchmark.group = f"{loaded.op} {case.label}"
    try:
        step = loaded.setup(case, provider)
    except ImportError as error:
        pytest.skip(f"{provider} is unavailable: {error}")
    action = step.action("full", step.grad_outputs())
    benchmark.pedantic(action.run, (None,), setup=action.prepare, rounds=10, warmup_rounds=2)
