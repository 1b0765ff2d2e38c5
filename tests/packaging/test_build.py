"""setup.py: its environment variables, its one-sentence errors, and what the native library is made of."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
needs_sources = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="runs in a source tree only")
pytestmark = needs_sources


def load_setup():
    spec = importlib.util.spec_from_file_location("memkernels_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_setup(*arguments, cwd=ROOT, **environment):
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def test_architectures_become_nvcc_flags():
    flags = load_setup().gencode_flags("8.0;9.0a,12.0+PTX")
    assert flags == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


@pytest.mark.parametrize("arches", ["sm_80", "8", "Hopper", " "])
def test_a_wrong_architecture_is_named(arches):
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST"):
        load_setup().gencode_flags(arches)


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"MEMKERNELS_BUILD": "gpu"}, "MEMKERNELS_BUILD='gpu': it takes none, or several of cpu, cuda and runtime."),
        ({"MEMKERNELS_BUILD": "none,cpu"}, "MEMKERNELS_BUILD='none,cpu': none stands alone."),
        ({"MEMKERNELS_BUILD": "cpu", "CXX": "no-such-compiler"}, "no C++ compiler; install g++ 11 or newer"),
        ({"MEMKERNELS_BUILD": "cuda", "PATH": "/usr/bin:/bin", "CUDA_HOME": ""}, "no nvcc; install the CUDA toolkit"),
    ],
    ids=["unknown library", "none with another", "no compiler", "no nvcc"],
)
def test_what_is_missing_is_one_sentence(environment, sentence, tmp_path):
    if "CUDA_HOME" in environment and shutil.which("nvcc", path=environment["PATH"]):
        pytest.skip("nvcc stands in /usr/bin here and cannot be hidden")
    result = run_setup("build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path / "temp", **environment)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("memkernels: ") and sentence in last


@pytest.mark.parametrize(
    ("hide", "sentence"),
    [
        (lambda monkeypatch, empty: monkeypatch.setitem(sys.modules, "pybind11", None), "pybind11 is missing; `pip"),
        (
            lambda monkeypatch, empty: monkeypatch.setattr("sysconfig.get_path", lambda name: empty),
            "Python.h is missing",
        ),
    ],
    ids=["no pybind11", "no Python.h"],
)
def test_without_what_the_runtime_needs_the_rest_is_built(hide, sentence, monkeypatch, tmp_path, capsys):
    setup = load_setup()
    hide(monkeypatch, str(tmp_path))
    monkeypatch.delenv("MEMKERNELS_BUILD", raising=False)
    assert setup.targets(None) == ["cpu"]
    assert re.match(rf"memkernels: built without offload, for {sentence}", capsys.readouterr().err)
    monkeypatch.setenv("MEMKERNELS_BUILD", "cpu,runtime")
    assert setup.targets(None) == ["cpu", "runtime"]
    assert re.match(sentence, setup.missing_for_runtime())


def test_a_compiler_that_is_too_old_is_one_sentence(tmp_path):
    cxx = tmp_path / "g++-10"
    cxx.write_text('#!/bin/sh\nexec g++ -U__GNUC__ -D__GNUC__=10 "$@"\n')
    cxx.chmod(0o755)
    result = run_setup("build_ext", "--build-lib", tmp_path, MEMKERNELS_BUILD="cpu", CXX=str(cxx))
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert re.fullmatch(r"memkernels: .+ is too old; install g\+\+ 11 or newer, or name one with CXX\.", last)


def test_an_nvcc_that_is_too_old_is_left_out_or_named(monkeypatch, tmp_path, capsys):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 12.4, V12.4.131\n")
    nvcc.chmod(0o755)
    setup = load_setup()
    monkeypatch.delenv("MEMKERNELS_BUILD", raising=False)
    assert "cuda" not in setup.targets(str(nvcc))
    assert "built without CUDA kernels, for nvcc 12.4 is too old; install CUDA 12.8" in capsys.readouterr().err
    nvcc.write_text(nvcc.read_text().replace("12.4", "12.8"))
    assert "cuda" in setup.targets(str(nvcc))


def test_inline_code_that_instruction_sets_share_is_the_baseline_build():
    """A processor without AVX-512 runs it too, so none of it may hold wider registers than the baseline's."""
    objects = {isa: sorted(ROOT.glob(f"build/temp*/native/{isa}/*.o")) for isa in ("baseline", "avx512", "amx")}
    library = ROOT / "memkernels" / "_C_cpu.so"
    if not library.exists() or not all(objects.values()) or not shutil.which("objdump"):
        pytest.skip("needs the x86 build folder and objdump")

    def weak_symbols(paths):
        listing = subprocess.run(["nm", *paths], capture_output=True, text=True, check=True).stdout
        return {line.split()[2] for line in listing.splitlines() if len(line.split()) == 3 and line.split()[1] == "W"}

    shared = weak_symbols(objects["baseline"]) & weak_symbols(objects["avx512"] + objects["amx"])
    assert shared
    wide, current = [], None
    disassembly = subprocess.run(["objdump", "-d", library], capture_output=True, text=True, check=True).stdout
    for line in disassembly.splitlines():
        if line.endswith(">:"):
            current = line.split("<")[1][:-2]
        elif current in shared and ("%zmm" in line or "%ymm" in line):
            wide.append(current)
    assert not wide


def test_the_source_distribution_holds_the_kernels(tmp_path):
    result = run_setup("egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as archived:
        names = {name.split("/", 1)[-1] for name in archived.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert sources <= names and {"setup.py", "LICENSE", "memkernels/ops/rms_norm/op.py"} <= names


@pytest.mark.slow
def test_the_wheel_serves_every_python_and_holds_the_libraries(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", tmp_path, ROOT]
    subprocess.run(command, check=True, env=os.environ | {"MEMKERNELS_BUILD": "cpu,runtime"})
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-linux" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    runtime = f"memkernels/_runtime{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert {"memkernels/_C_cpu.so", runtime, "memkernels/build_info.json", "memkernels/py.typed"} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "csrc", "benchmarks"))]
