"""Models of other libraries: `patch` puts memkernels into one, `unpatch` takes it out again.

A family of models is one short file, a `Family`; what replaces a module's forward is one file a kind of module
(norm.py, attention.py, mlp.py, decoder_layer.py, loss.py), shared by the families.
"""

from memkernels.integrations.patching import PatchReport, patch, unpatch

__all__ = ["PatchReport", "patch", "unpatch"]
