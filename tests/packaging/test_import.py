"""Importing memkernels is lean, and works, with a reason given, where no native library is built."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import memkernels

PACKAGE = Path(memkernels.__file__).parent


def run_python(code, cwd, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )


def test_import_loads_neither_triton_nor_transformers():
    code = "import sys, memkernels; print([m for m in ('triton', 'transformers', 'peft') if m in sys.modules])"
    assert run_python(code, PACKAGE.parent).stdout.strip() == "[]"


def test_without_the_native_library_the_reference_computes_and_the_reason_is_given(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "memkernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = """
import torch
import memkernels
from memkernels import _library
x, weight = torch.randn(3, 8, requires_grad=True), torch.ones(8)
y = memkernels.ops.rms_norm(x, weight)
y.sum().backward()
torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (8,), weight, 1e-6))
print(_library.missing("rms_norm_fwd", "cpu"))
"""
    result = run_python(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("_C_cpu.so is not built")


def test_an_unknown_instruction_set_is_named():
    result = run_python("import memkernels", PACKAGE.parent, MEMKERNELS_CPU="sse9")
    assert result.returncode != 0
    assert "MEMKERNELS_CPU: got 'sse9', it takes baseline, avx2, avx512, amx." in result.stderr
