"""A batch in parts, so that activations exist for one part at a time."""

from memkernels.microbatch.run import micro_batch

__all__ = ["micro_batch"]
