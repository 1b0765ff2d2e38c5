"""Low-rank adapters for models that PEFT does not wrap, in PEFT's file format."""

from memkernels.adapters.inject import lora
from memkernels.adapters.load import load_adapter
from memkernels.adapters.merging import merge_adapter, unmerge_adapter
from memkernels.adapters.pretrained import load_base, parameters_on_meta
from memkernels.adapters.report import LoRAReport
from memkernels.adapters.save import save_adapter

__all__ = [
    "LoRAReport", "load_adapter", "load_base", "lora", "merge_adapter", "parameters_on_meta", "save_adapter",
    "unmerge_adapter",
]  # fmt: skip
