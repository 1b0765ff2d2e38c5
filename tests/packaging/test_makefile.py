"""The Makefile says in one sentence what is missing, before it makes anything."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def make(target, folder, **variables):
    command = ["make", target, f"PYTHON={sys.executable}", f"VENV={folder / 'venv'}"]
    # As at first hand: within `make test` it would say which folder it enters.
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment | variables)
    assert result.returncode != 0 and not (folder / "venv").exists()
    return result.stdout


@pytest.mark.parametrize("target", ["test", "test-slow", "bench"])
def test_headers_of_python(target, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(f"import sysconfig; sysconfig.get_path = lambda name: {str(tmp_path)!r}")
    assert make(target, tmp_path, PYTHONPATH=str(tmp_path)).startswith("memkernels: Python.h is missing; install")


@pytest.mark.parametrize("compiler", ["old", "missing"])
def test_compiler(compiler, tmp_path):
    path = tmp_path / compiler
    if compiler == "old":
        path.write_text('#!/bin/sh\nexec g++ -U__clang__ -U__GNUC__ -D__GNUC__=10 "$@"\n')
        path.chmod(0o755)
    assert make("env", tmp_path, CXX=str(path)).startswith("memkernels: a C++ compiler is missing or too old; install")
