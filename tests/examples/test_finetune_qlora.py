"""The QLoRA example: the file it writes, a small model's training and files, and the 2 GB of the real one."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memkernels.testing import peak_bytes, run_in_child

pytest.importorskip("transformers", reason="transformers is not installed: pip install memkernels[hf]")

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    module = importlib.import_module("finetune_qlora")
    monkeypatch.setattr(module, "return_freed_memory", lambda: None)  # of this process
    return module


@pytest.fixture
def small(example):
    return example.Shape(width=64, feed_forward=128, layers=2, heads=4, key_heads=2, vocabulary=300)


def test_the_random_model_is_one_that_transformers_reads(example, small, tmp_path):
    from transformers import LlamaForCausalLM

    random_llama = importlib.import_module("random_llama")
    random_llama.write_random_llama(tmp_path, example._config(small))
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    assert model.config.vocab_size == 300 and model.dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            assert 0.018 < parameter.std().item() < 0.022 and abs(parameter.mean().item()) < 0.002, name
    written = (tmp_path / "model.safetensors").stat().st_mtime_ns
    random_llama.write_random_llama(tmp_path, example._config(small))
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == written


def test_a_small_model_learns_and_its_adapter_is_saved(example, small, tmp_path, capsys):
    assert example.main(["--steps", "8", "--tokens", "128", "--output", str(tmp_path)], small) == 0
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"([\d.]+) after \d+", printed)]
    assert losses[0] == pytest.approx(5.7, abs=0.2) and losses[-1] < losses[0] - 0.1
    assert "LlamaForCausalLM: 14 layers with adapters" in printed and "14 of them over quantised weights" in printed
    assert re.search(r"peak resident memory: \d+ MB", printed)
    assert "left as they were" not in printed
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 16
    assert {file.name for file in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "base"}


def make_checkpoint(folder, example, small):
    """The random model in the user's role, with a tokenizer."""
    importlib.import_module("random_llama").write_random_llama(folder, example._config(small))
    write_tokenizer(folder)


def write_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {chr(code): code for code in range(256)} | {"?": 256}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[], unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def test_a_checkpoint_of_the_users(example, small, tmp_path, capsys):
    make_checkpoint(tmp_path / "model", example, small)
    arguments = ["--steps", "2", "--tokens", "64", "--checkpoint", str(tmp_path / "model"), "--output"]
    assert example.main([*arguments, str(tmp_path / "adapter")]) == 0
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == 14
    training, held_out = example._tokenized(tmp_path / "model", 2, 64)
    first, *_ = importlib.import_module("memkernels.demo.data").standard_library_files()[0]
    text = first.read_text()[:128]
    assert "".join(chr(token) for token in torch.cat(training)) == text and held_out.shape == (64,)
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert example.main([*arguments, str(tmp_path / "other")]) == 2
    assert f"finetune_qlora: {file}: truncated" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_checkpoint_that_bitsandbytes_quantised(example, small, tmp_path, capsys):
    """As transformers writes a model that was loaded with load_in_4bit."""
    from safetensors.torch import load_file

    from memkernels import quant

    folder, file = tmp_path / "model", tmp_path / "model" / "model.safetensors"
    make_checkpoint(folder, example, small)
    dense = load_file(file)
    quant.save_file({name: quant.quantize_nf4(of) if "_proj" in name else of for name, of in dense.items()}, file)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (folder / "config.json").write_text(json.dumps(config))
    arguments = ["--steps", "1", "--tokens", "64", "--checkpoint", str(folder), "--output", str(tmp_path / "adapter")]
    assert example.main(arguments) == 0
    assert "14 of them over quantised weights" in capsys.readouterr().out


def test_a_checkpoint_of_a_mixture_of_experts(example, tmp_path, capsys, monkeypatch):
    """Its experts are quantised, without adapters."""
    from transformers import MixtralConfig, MixtralForCausalLM

    from memkernels import quant

    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(**sizes, vocab_size=300, num_key_value_heads=2, num_local_experts=4)
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    model = example.load_model(tmp_path / "model")
    experts = [parameter for name, parameter in model.named_parameters() if ".experts." in name]
    assert len(experts) == 4 and all(isinstance(parameter, quant.NF4Tensor) for parameter in experts)
    monkeypatch.setattr(example, "load_model", lambda folder: model)
    arguments = ["--steps", "2", "--tokens", "64", "--checkpoint", str(tmp_path / "model")]
    assert example.main([*arguments, "--output", str(tmp_path / "adapter")]) == 0
    printed = capsys.readouterr().out
    assert "8 layers with adapters" in printed and "2  experts" in printed


@pytest.mark.parametrize("option", ["--steps", "--tokens"])
def test_bad_arguments(example, capsys, option, tmp_path):
    assert example.main([option, "0", "--output", str(tmp_path / "x")]) == 2
    assert f"{option}: expected a positive number, got 0" in capsys.readouterr().err
    assert example.main(["--checkpoint", str(tmp_path / "none")]) == 2
    assert "finetune_qlora: " in capsys.readouterr().err


def small_peak(folder):
    """Bytes above what the imports take."""
    sys.path.insert(0, str(EXAMPLES))
    example = importlib.import_module("finetune_qlora")
    importlib.import_module("transformers.models.llama.modeling_llama")
    shape = example.Shape(width=1024, feed_forward=2816, layers=10, heads=16, key_heads=4, vocabulary=1000)
    return peak_bytes(lambda: example.main(["--steps", "1", "--tokens", "64", "--output", folder], shape))


def test_the_dense_model_never_exists(tmp_path):
    # Quantised weights, adapters, gradients and moments together are less than the dense weights alone.
    peak = run_in_child(small_peak, str(tmp_path))
    assert peak < (tmp_path / "base" / "model.safetensors").stat().st_size == pytest.approx(229e6, rel=0.01)


def run_example(*arguments):
    """The example in a process of its own; what it prints, and its peak in MB.

    By a shell that stays: Linux counts the peak of the process that calls exec, here that of the tests, as the new
    program's. The shell's is small.
    """
    script = '"$0" "$@"; exit $?'
    command = ["sh", "-c", script, sys.executable, str(EXAMPLES / "finetune_qlora.py"), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (peak,) = re.findall(r"peak resident memory: (\d+) MB", done.stdout)
    return done.stdout, int(peak)


@pytest.mark.slow
def test_a_billion_parameters_in_less_than_2_gb(tmp_path):
    printed, peak = run_example("--steps", 1, "--output", tmp_path)
    assert (tmp_path / "base" / "model.safetensors").stat().st_size > 2.1e9
    assert peak < 2000, printed
