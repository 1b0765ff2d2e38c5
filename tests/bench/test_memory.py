"""The memory of a step, in a process of its own."""

import textwrap

from memkernels.bench.memory import measure_memory
from memkernels.testing import run_in_child

MB = 1 << 20
BENCHMARK = """
    import torch

    from memkernels.bench import Benchmark, Case, Step


    def setup(case, provider):
        x, kept = torch.ones(4, requires_grad=True), []

        def forward():
            if provider == "keeps" and not kept:
                kept.append(torch.ones(8 << 20))
            return x.sum()

        return Step(forward, (x,), release=kept.clear)


    benchmark = Benchmark(
        op="kept", cases=(Case("small", torch.float32),), providers=("eager", "keeps"), setup=setup
    )
"""


def test_what_is_kept_between_steps_is_part_of_their_peak(tmp_path):
    (tmp_path / "kept.py").write_text(textwrap.dedent(BENCHMARK))
    eager, keeps = (
        run_in_child(measure_memory, str(tmp_path / "kept.py"), "small/float32", provider)
        for provider in ("eager", "keeps")
    )
    assert eager["memory"] < MB and eager["memory_with_gradients"] < MB
    assert min(keeps["memory"], keeps["memory_with_gradients"]) >= 32 * MB
