"""What training needs later, kept outside of the memory it computes in: in host memory, or on disk."""

from memkernels.offload.activations import offload_activations
from memkernels.offload.store import TieredStore

__all__ = ["TieredStore", "offload_activations"]
