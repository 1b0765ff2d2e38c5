"""Bytes that a rank of optim.ShardedOptimizer holds, against the formulas of ZeRO and the planner's, with 50 million
parameters: those of benchmarks/steps/zero_memory.py."""

from pathlib import Path

import pytest

from memkernels.bench.registry import load
from memkernels.optim.buckets import bytes_exchanged

FILE = Path(__file__).parents[2] / "benchmarks" / "steps" / "zero_memory.py"
LAYERS, ELEMENTS = 12, 2048 * 2048
benchmark = load(FILE)


@pytest.mark.slow
@pytest.mark.parametrize("label", [case.label for case in benchmark.cases])
def test_a_rank_holds_what_the_formulas_say(label):
    case = benchmark.case(label)
    formula, measured, buckets, peak = (benchmark.held(case, provider) for provider in benchmark.providers)
    assert abs(measured / formula - 1) < 0.03
    stage, ranks, of_one, sent = (
        *(case.sizes[name] for name in ("stage", "ranks")),
        case.dtype.itemsize,
        case.sizes["sent"],
    )
    if stage == 3:
        assert buckets == 0
        return
    planned = [
        bytes_exchanged(
            [ELEMENTS * of_one] * LAYERS, stage, ranks=ranks, itemsize=of_one, sent_itemsize=sent, parts=parts
        )
        for parts in (1, 2)
    ]
    summed = 4 * ELEMENTS // ranks  # in float32, and let go
    assert buckets == planned[0] - (summed if sent != of_one else 0)
    # Autograd has a layer's gradient until what is called with it returns.
    assert abs(peak / (formula + planned[1] + of_one * ELEMENTS) - 1) < 0.03
