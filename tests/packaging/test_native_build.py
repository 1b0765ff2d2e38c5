"""What the native build compiles, anew and again, and what it writes down, by compilers that only note their arguments.

`setup.py` writes what ninja runs; ninja is the real one.
"""

import importlib.util
import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import setuptools
import torch
from setuptools import Distribution

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="runs in a source tree only")

# Of a source it depends on what that includes itself; headers of headers are left out.
COMPILER = """#!/bin/sh
[ "$1" = --version ] && { echo "release 13.0 of a compiler for tests"; exit; }
case "$*" in *" -E "*) exit 0;; esac  # which asks for its release
echo "$*" >> FOLDER/commands
while [ $# -gt 0 ]; do
  case $1 in -o) output=$2;; -MF) depfile=$2;; -c) source=$2;; esac
  shift
done
: > "$output"
[ -z "$depfile" ] || echo $output: $source $(sed -n 's|^#include "\\(.*\\)"|FOLDER/csrc/\\1|p' $source) > "$depfile"
"""
NINJA = """#!/bin/sh
echo "$*" >> FOLDER/ninja_arguments
exec REAL "$@"
"""


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder with a few of the sources, and tools that note their arguments in it."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    for source in (tmp_path / "csrc" / "cpu").glob("*.cpp"):
        if source.stem not in ("attention_fwd", "isa", "rms_norm", "rotary"):
            source.unlink()
    shutil.copy(ROOT / "setup.py", tmp_path)
    real = shutil.which("ninja") or str(Path(sys.executable).with_name("ninja"))
    for name, text in (("cxx", COMPILER), ("nvcc", COMPILER), ("ninja", NINJA)):
        tool = tmp_path / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(text.replace("FOLDER", str(tmp_path)).replace("REAL", real))
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("CXX", str(tmp_path / "bin" / "cxx"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("MEMKERNELS_BUILD", "cpu")
    for name in ("MAX_JOBS", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def load_setup(folder):
    spec = importlib.util.spec_from_file_location("memkernels_setup", folder / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(clone):
    """Builds in place; the arguments of each compiler's call, by its output."""
    commands = clone / "commands"
    commands.write_text("")
    command = load_setup(clone).build_native(Distribution())
    command.inplace, command.build_temp = True, str(clone / "build")
    command.run()
    calls = [shlex.split(line) for line in commands.read_text().splitlines()]
    return {call[call.index("-o") + 1]: call for call in calls}


def test_a_second_build_compiles_only_what_changed(clone):
    isas = load_setup(clone).build_native.isas()
    kernels = clone / "csrc" / "cpu"
    sources = {path.stem: path.read_text() for path in kernels.glob("*.cpp")}
    first = build(clone)
    assert {f"baseline/{stem}.o" for stem in sources} | {"library.o", "_C_cpu.so"} <= first.keys()
    assert (clone / "memkernels" / "_C_cpu.so").exists()
    assert build(clone).keys() == set()

    (kernels / "rms_norm.cpp").touch()
    assert build(clone).keys() == {f"{isa}/rms_norm.o" for isa in isas if isa != "amx"} | {"_C_cpu.so"}
    (kernels / "row_sums.h").touch()
    including = [stem for stem, text in sources.items() if '"cpu/row_sums.h"' in text]
    assert 0 < len(including) < len(sources)
    again = {f"{isa}/{stem}.o" for isa in isas for stem in including} & first.keys()
    assert build(clone).keys() == again | {"_C_cpu.so"}

    (clone / "setup.py").write_text((clone / "setup.py").read_text().replace('"-O3"', '"-O2"'))
    assert build(clone).keys() == first.keys()


def test_build_info_holds_every_flag_that_compilers_were_given(clone, monkeypatch):
    setup = load_setup(clone)
    libraries = ["cpu", "cuda", *([] if setup.missing_for_runtime() else ["runtime"])]
    monkeypatch.setenv("MEMKERNELS_BUILD", ",".join(libraries))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    calls = build(clone)
    info = json.loads((clone / "memkernels" / "build_info.json").read_text())
    assert info["libraries"] == libraries and info["torch"] == torch.__version__
    assert info["cxx"] == info["nvcc"] == "release 13.0 of a compiler for tests"
    assert info["cuda_architectures"] == "9.0a" and "-gencode=arch=compute_90a,code=sm_90a" in info["cuda_flags"]
    recorded = {isa: info["cpu_flags"] + flags for isa, flags in info["instruction_sets"].items()}
    recorded |= {"cuda": info["cuda_flags"]}
    if "runtime" in libraries:
        recorded["runtime"] = info["runtime_flags"]
    assert "-mavx2" in recorded.get("avx2", ["-mavx2"])
    compiled = {output.split("/")[0]: call for output, call in calls.items() if output.count("/") == 1}
    assert compiled.keys() == recorded.keys()
    for kind, call in compiled.items():
        assert own_flags(call) == recorded[kind], kind


def test_without_liburing_the_runtime_is_built_for_threads(clone, monkeypatch):
    if load_setup(clone).missing_for_runtime():
        pytest.skip("needs what the runtime needs")
    monkeypatch.setenv("MEMKERNELS_BUILD", "runtime")
    compiler = clone / "bin" / "cxx"
    for found in (True, False):
        assert any("-DMEMKERNELS_LIBURING" in call for call in build(clone).values()) == found
        info = json.loads((clone / "memkernels" / "build_info.json").read_text())
        assert ("-DMEMKERNELS_LIBURING" in info["runtime_flags"]) == found
        assert info["io_uring"] == "by liburing" if found else info["io_uring"].startswith("no liburing found")
        compiler.write_text(
            compiler.read_text().replace("#!/bin/sh", '#!/bin/sh\ncase "$*" in *liburing.a*) exit 1;; esac')
        )


def own_flags(call):
    """A compiler's arguments without files and folders."""
    with_a_file = ("-MF", "-c", "-o", "-isystem", "-ccbin")
    return [
        word
        for before, word in zip(["", *call], call, strict=False)
        if word not in (*with_a_file, "-MMD", "-MD") and before not in with_a_file and not word.startswith("-I")
    ]


@pytest.mark.parametrize(("jobs", "arguments"), [("3", ["-j", "3"]), ("", []), (None, [])], ids=str)
def test_ninja_runs_as_many_jobs_as_asked(clone, monkeypatch, jobs, arguments):
    if jobs is not None:
        monkeypatch.setenv("MAX_JOBS", jobs)
    build(clone)
    (given,) = (clone / "ninja_arguments").read_text().splitlines()
    assert given.split()[2:] == arguments


def no_ninja(monkeypatch, clone):
    monkeypatch.setenv("PATH", str(clone))
    monkeypatch.setattr(sys, "executable", str(clone / "python"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (no_ninja, "ninja is missing; `pip install ninja`."),
        (lambda monkeypatch, clone: monkeypatch.setitem(sys.modules, "torch", None), "torch is missing; `pip install"),
        (
            lambda monkeypatch, clone: monkeypatch.setattr(torch, "__version__", "2.9.1+cpu"),
            r"torch 2.9.1\+cpu is too old; memkernels needs torch 2.10 or newer.",
        ),
        (
            lambda monkeypatch, clone: monkeypatch.setattr(setuptools, "__version__", "65.5.0"),
            "setuptools 65.5.0 is too old; `pip install --upgrade setuptools`.",
        ),
        (lambda monkeypatch, clone: monkeypatch.setenv("MAX_JOBS", "all"), "MAX_JOBS='all': it takes a positive num"),
        (lambda monkeypatch, clone: monkeypatch.setenv("MAX_JOBS", "0"), "MAX_JOBS='0': it takes a positive number."),
    ],
    ids=["no ninja", "no torch", "old torch", "old setuptools", "jobs that are no number", "no jobs"],
)
def test_what_is_missing_is_one_sentence_and_nothing_is_built(clone, monkeypatch, change, sentence):
    change(monkeypatch, clone)
    with pytest.raises(SystemExit, match=f"^memkernels: {sentence}"):
        build(clone)
    assert not (clone / "build").exists() and not list((clone / "memkernels").glob("*"))
