"""Benchmarks: providers of one computation measured against each other in one run.

`benchmarks/ops/<op>.py` declares what to measure, `python -m memkernels.bench` measures it,
`python -m memkernels.bench.plot` draws the results and `python -m memkernels.bench.report` writes them into README.
"""

from memkernels.bench.registry import Benchmark, Case, Work
from memkernels.bench.step import Step

__all__ = ["Benchmark", "Case", "Step", "Work"]
