"""Plans against peaks that were measured: a small Llama's training step, under many combinations of techniques."""

import ctypes
import functools
import importlib.util
import tempfile
from pathlib import Path

import pytest
import torch

import memkernels
from memkernels import optim
from memkernels.testing import peak_bytes, run_in_child

pytest.importorskip("transformers", reason="transformers is not installed: pip install memkernels[plan]")

pytestmark = pytest.mark.xdist_group("measured peaks")  # all are measured once, in one of the processes

M_MMAP_THRESHOLD = -3  # malloc.h
LARGEST_ERROR = 0.05  # the share that the planner promises
CASES = {
    "plain transformers": {"recompute": "transformers", "state_bits": 32},
    "nothing recomputed": {"recompute": "none", "state_bits": 32},
    "sublayers, 8 bits": {"recompute": "sublayer", "state_bits": 8},
    "layers, 4 bits": {"recompute": "layer", "state_bits": 4},
    "layers, tied embeddings": {"recompute": "layer", "state_bits": 16, "tied": True},
    "layers, Lion": {"recompute": "layer", "state_bits": 32, "optimizer": "lion"},
    "layers, Muon": {"recompute": "layer", "state_bits": 8, "optimizer": "muon"},
    "Adafactor steps in backward": {
        "recompute": "layer", "state_bits": 32, "optimizer": "adafactor", "step_in_backward": True,
    },
    "steps in backward": {"recompute": "layer", "state_bits": 8, "step_in_backward": True},
    "a row at a time": {"recompute": "sublayer", "state_bits": 32, "micro_batch": 1, "optimizer": "sgd"},
    "adapters": {"recompute": "sublayer", "state_bits": 32, "lora": 8},
    "adapters, nothing recomputed": {"recompute": "none", "state_bits": 32, "lora": 8},
    "adapters on NF4": {"recompute": "layer", "state_bits": 32, "lora": 8, "base": "nf4"},
    "adapters on NF4, plain transformers": {"recompute": "transformers", "state_bits": 32, "lora": 8, "base": "nf4"},
    "plain transformers, to disk": {"recompute": "transformers", "state_bits": 8, "offload": "disk"},
    "states to disk": {"recompute": "layer", "state_bits": 32, "offload_states": "disk"},
    "states and gradients to disk, a row at a time": {
        "recompute": "layer", "state_bits": 32, "offload_states": "disk", "offload_gradients": "disk",
        "micro_batch": 1,
    },
    "gradients to disk": {"recompute": "layer", "state_bits": 8, "offload_gradients": "disk"},
}  # fmt: skip
QUICK = ("plain transformers", "layers, 4 bits", "layers, Muon", "adapters on NF4", "plain transformers, to disk")
HAS_RUNTIME = importlib.util.find_spec("memkernels._runtime") is not None
SHAPE = {"seq": 512, "batch": 2}
OPTIMIZERS = {
    "adamw": (optim.AdamW, {}), "lion": (optim.Lion, {}), "sgd": (optim.SGD, {"momentum": 0.9}),
    "adafactor": (optim.Adafactor, {}), "muon": (optim.Muon, {}),
}  # fmt: skip


def config_of(tied=False):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=8000, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=tied,
    )  # fmt: skip


def measure_all(path, names):
    # Tensors as small as these come from the heap otherwise, which keeps the holes that freed ones leave.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    return {name: measure(CASES[name], path) for name in names if HAS_RUNTIME or "disk" not in CASES[name].values()}


def measure(case, path):
    """Bytes of a step at its highest above what is there before it; of parameters and states; of offload's blocks."""
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, case.get("dtype", "float32"))
    model = AutoModelForCausalLM.from_config(config_of(case.get("tied", False)), dtype=dtype).train()
    if "lora" in case:
        memkernels.lora(model, r=case["lora"], base=case.get("base"))
    if case["recompute"] != "transformers":
        memkernels.patch(model, recompute=case["recompute"])
    kind, options = OPTIMIZERS[case.get("optimizer", "adamw")]
    options = options | {"state_bits": case["state_bits"], "rounding": case.get("rounding", "stochastic")}
    offload = memkernels.offload.offload_activations("disk", path=path) if "offload" in case else None
    ids = torch.zeros(SHAPE["batch"], SHAPE["seq"], dtype=torch.int64)
    trained = [p for p in model.parameters() if p.requires_grad]
    steppers, optimizers = [], []
    if case.get("step_in_backward"):
        steppers = [optim.step_in_backward(model, kind, **options)]
    elif kind is optim.Muon:
        matrices = {p for p in model.model.layers.parameters() if p.dim() == 2}
        others = optim.AdamW([p for p in trained if p not in matrices], **options)
        optimizers = [kind([p for p in trained if p in matrices], **options), others]
    else:
        optimizers = [kind(trained, **options)]
    for moving, move in (("offload_states", optim.offload_states), ("offload_gradients", optim.offload_gradients)):
        if moving in case:
            move(optimizers[0], case[moving], path=path)

    def step():
        for rows in ids.split(case.get("micro_batch", SHAPE["batch"])):
            if offload is None:
                loss = model(input_ids=rows, labels=rows).loss
            else:
                with offload:
                    loss = model(input_ids=rows, labels=rows).loss
            loss.backward()
            del loss
        for optimizer in optimizers:
            optimizer.step()
        for parameter in trained:
            parameter.grad = None

    step()
    above = peak_bytes(step)
    optimizers += [stepper.optimizer for stepper in steppers]
    states = [state for optimizer in optimizers for state in optimizer.state.values() if type(state) is dict]
    kept = [tensor for state in states for name, tensor in state.items() if name != "step"]
    kept += [part for p in model.parameters() for part in (p.parts if hasattr(p, "parts") else (p,))]
    stores = [offload._store] if offload else []
    stores += [of.store for optimizer in optimizers for of in (optimizer.tiers, optimizer.gradient_tiers) if of]
    blocks = sum(store._slab.statistics()["peak_in_use"] for store in stores)
    return above, sum(tensor.nbytes for tensor in kept), blocks


@functools.cache
def measured(names):
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as on_a_disk:
        return run_in_child(measure_all, on_a_disk, names)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_a_planned_peak_is_the_measured_one(name):
    found = measured(QUICK if name in QUICK else tuple(name for name in CASES if name not in QUICK))
    if name not in found:
        pytest.skip("built without pybind11 or Python's headers")
    above, kept, blocks = found[name]
    options = {"dtype": "float32", "offload": "none", "step_in_backward": False, "micro_batch": 2}
    options |= {"offload_states": "none", "offload_gradients": "none"} | CASES[name]
    tied = options.pop("tied", False)
    (estimate,) = memkernels.plan(config_of(tied), memory="1GB", stage=0, **SHAPE, **options).estimates
    planned = estimate.parts
    assert planned["parameters"] + planned["states"] == pytest.approx(kept, rel=1e-3)
    assert estimate.peak == pytest.approx(above + kept + blocks, rel=LARGEST_ERROR)
