"""Drop-in modules: the same parameters and state_dict keys as the modules that they replace."""

from memkernels.nn.norm import RMSNorm

__all__ = ["RMSNorm"]
