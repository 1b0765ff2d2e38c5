"""Forward and backward of a Llama under LoRA over NF4 weights: PEFT over bitsandbytes, eager and with gradient
checkpointing, and memkernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import memkernels
from memkernels.bench import Benchmark, Case, Step, Work
from memkernels.bench.llama import LLAMA, llama_config
from memkernels.quant import QuantizedTensor

LORA = {"r": 16, "alpha": 32, "dropout": 0.05}


def setup(case: Case, provider: str) -> Step:
    from transformers import LlamaForCausalLM

    sizes = case.sizes
    model: Any = LlamaForCausalLM(llama_config(sizes)).to(case.device, case.dtype).train()
    tokens = torch.randint(sizes["vocabulary"], (1, sizes["tokens"]), device=case.device)
    if provider == "memkernels":
        memkernels.lora(model, **LORA, base="nf4")
        memkernels.patch(model, recompute="layer")
    else:
        model = _peft(model, case)
        if provider == "peft-checkpoint":
            model.gradient_checkpointing_enable({"use_reentrant": False})
    return Step(lambda: model(input_ids=tokens, labels=tokens).loss, parameters=_stored(model))


def _peft(model: Any, case: Case) -> Any:
    """PEFT's LoRA, with the layers' weights quantised by bitsandbytes as transformers does it."""
    import bitsandbytes
    import peft

    linears = [(name, module) for name, module in model.model.named_modules() if type(module) is torch.nn.Linear]
    for name, linear in linears:
        stored = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=case.dtype, quant_type="nf4"
        )
        weight = linear.weight.data
        stored.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=stored)
        model.model.set_submodule(name, stored.to(case.device))
    model.is_loaded_in_4bit = True
    config = peft.LoraConfig(
        r=LORA["r"], lora_alpha=LORA["alpha"], lora_dropout=LORA["dropout"], target_modules="all-linear"
    )
    return peft.get_peft_model(model, config)


def _stored(model: Any) -> tuple[Tensor, ...]:
    """What a model holds, trained or not."""
    found: list[Tensor] = []
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        nested = getattr(state, "state2", None)
        found += parameter.parts if isinstance(parameter, QuantizedTensor) else [parameter]
        found += [
            of for of in (state and state.absmax, state and state.code, nested and nested.absmax) if of is not None
        ]
    return tuple(found)


def work(case: Case, mode: str) -> Work:
    """FLOPs of the matrix products, those of the adapters left out, and of causal attention, without recomputation.

    Backward has those of forward, and attention's twice: no weight has a gradient.
    """
    sizes = case.sizes
    width, tokens = sizes["width"], sizes["tokens"]
    keys = width * sizes["k_heads"] // sizes["q_heads"]
    layer = 2 * width * (width + keys) + 3 * width * sizes["feed_forward"]
    products = 2 * tokens * (sizes["layers"] * layer + width * sizes["vocabulary"])
    attention = 2 * tokens * sizes["layers"] * tokens * width
    return Work(
        flops={
            "forward": products + attention,
            "backward": products + 2 * attention,
            "full": 2 * products + 3 * attention,
        }[mode]
    )


benchmark = Benchmark(
    op="qlora",
    cases=(Case("d1024-f2816-L6-V32000-T2048-r16-dropout5%", torch.bfloat16, LLAMA),),
    providers=("peft", "peft-checkpoint", "memkernels"),
    setup=setup,
    work=work,
    baseline="peft",
    modes=("full",),
)
