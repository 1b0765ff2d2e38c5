"""The command line: info and bench."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from memkernels import _library, info
from memkernels.cli import main


def test_info_reports_versions_and_implementations_and_checks_an_op(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for expected in ("torch", "triton", "compilers here", "devices", "rms_norm on cpu, bfloat16: right"):
        assert expected in printed
    for operator in ("rms_norm_fwd", "rms_norm_bwd"):
        assert any(line.split()[:1] == [operator] and "gpu: Triton" in line for line in printed.splitlines())
    assert f"cpu: C++ ({_library.cpu_isa()})" in printed
    assert "cpu: rms_norm's and layer_norm's other kernels, since it has no implementation for cpu" in printed


@pytest.mark.parametrize(
    ("gpu", "built", "expected"),
    [
        (False, False, "with a gpu: plain PyTorch, since _C_cuda.so is not built: run "),
        (False, True, "with a gpu: CUDA C++"),
        (True, True, "; gpu: plain PyTorch, since this torch is built without CUDA"),
    ],
)
def test_info_says_what_a_gpu_would_run_where_there_is_none(monkeypatch, gpu, built, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(_library, "cuda_missing", "this torch is built without CUDA.")
    monkeypatch.setattr(_library, "not_built", lambda name: None if built else f"{name} is not built: run pip.")
    monkeypatch.setattr(_library, "_native_devices", {name: ["cpu"] for name in _library._native_devices})
    operators = info._operators()
    assert expected in operators["adamw_"]
    assert f"{'gpu' if gpu else 'with a gpu'}: Triton" in operators["rms_norm_fwd"]
    if not gpu:
        assert operators["on_huge_pages_"].endswith(
            "with a gpu: memory as torch gives it, since it has no implementation for cuda"
        )


def test_info_knows_what_the_cuda_library_implements():
    sources = (Path(__file__).parents[1] / "csrc" / "cuda").glob("*.cu")
    registered = [name for source in sources for name in re.findall(r'm\.impl\("(\w+)"', source.read_text())]
    assert tuple(sorted(registered)) == info.CUDA_OPERATORS


def test_info_ends_quietly_where_its_reader_has_left():
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, "-m", "memkernels", "info"], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (1, "")


def test_info_names_the_instruction_set_of_each_operators_build(capsys, monkeypatch):
    monkeypatch.setattr(_library, "cpu_isa", lambda: "amx")
    monkeypatch.setattr(_library, "has_cpu_build", lambda operator: operator.startswith("attention"))
    main(["info"])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.split()}
    assert "cpu: C++ (amx)" in lines["attention_fwd"] and "cpu: C++ (avx512)" in lines["rms_norm_fwd"]


def test_info_says_why_an_implementation_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(_library, "missing", lambda operator, device: "_C_cpu.so is not built: run pip.")
    main(["info"])
    assert "cpu: plain PyTorch, since _C_cpu.so is not built: run pip;" in capsys.readouterr().out


def test_info_says_what_moves_bytes_to_disk(capsys, monkeypatch):
    runtime = SimpleNamespace(io_uring_missing=lambda: None)
    monkeypatch.setattr(info, "load_runtime", lambda: runtime)
    main(["info"])
    assert "offload through io_uring" in capsys.readouterr().out
    runtime.io_uring_missing = lambda: "built without liburing"
    main(["info"])
    assert "offload by threads without io_uring: built without liburing" in capsys.readouterr().out


def test_info_reports_a_wrong_result(capsys, monkeypatch):
    monkeypatch.setattr(info.ops, "rms_norm", lambda x, weight: x * weight)
    assert main(["info"]) == 1
    assert "rms_norm on cpu, bfloat16: WRONG" in capsys.readouterr().out


def test_bench_is_a_command(capsys):
    assert main(["bench", "no_such_op"]) == 2
    assert "op must be among" in capsys.readouterr().err


def test_the_module_runs_and_needs_a_command():
    result = subprocess.run([sys.executable, "-m", "memkernels"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "python -m memkernels" in result.stderr and "{demo,info,bench,plan,profile}" in result.stderr
