"""The command line: info and bench."""

import subprocess
import sys
from types import SimpleNamespace

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
