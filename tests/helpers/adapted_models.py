"""A model under PEFT's adapters."""

import torch


def adapted(model, *, autocast=False, **options):
    """With the same adapters on every call, none of them zero, in training mode; options: of LoraConfig."""
    import peft

    options = {"target_modules": "all-linear", "r": 4, "lora_alpha": 6, "init_lora_weights": False} | options
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=autocast).train()
