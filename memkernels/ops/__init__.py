"""The functional ops. Each is an autograd Function over registered operators; its docstring says what it saves."""

from memkernels.ops.attention.op import attention
from memkernels.ops.rms_norm.op import rms_norm

__all__ = ["attention", "rms_norm"]
