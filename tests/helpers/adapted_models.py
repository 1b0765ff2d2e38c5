"""A model under PEFT's adapters, and one under those of `memkernels.lora`."""

import torch

from memkernels.nn import LoRALinear


def adapted(model, *, autocast=False, **options):
    """With the same adapters on every call, none of them zero, in training mode; options: of LoraConfig."""
    import peft

    options = {"target_modules": "all-linear", "r": 4, "lora_alpha": 6, "init_lora_weights": False} | options
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=autocast).train()


def randomise(model, scale=0.1):
    """Adds the same random values on every call to the adapters' factors, of which `memkernels.lora` makes b zero."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape), alpha=scale)
    return model


def adapted_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
