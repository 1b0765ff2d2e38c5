"""The memory of a training step over time, by what it is for."""

from memkernels.profiling.recording import profile

__all__ = ["profile"]
