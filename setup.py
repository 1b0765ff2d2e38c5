"""Builds the native libraries with ninja and puts them beside the Python sources.

`memkernels/_C_cpu.so`: every csrc/cpu kernel once per instruction set that it gains by; the choice falls at run time.
`memkernels/_C_cuda.so`: every csrc/cuda kernel for each architecture of TORCH_CUDA_ARCH_LIST, wherever nvcc is found.
Both use the LibTorch stable ABI, so one build serves every torch from 2.10 on and needs no GPU.
`memkernels/_runtime.*.so`: csrc/runtime, what offload needs, for the Python that builds it. It takes in liburing where
its headers and its static library are.

Environment: MEMKERNELS_BUILD (none, or several of cpu, cuda, runtime), TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX, CUDA_HOME.
"""

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

if int(setuptools.__version__.split(".")[0]) < 77:  # of pyproject.toml
    sys.exit(f"memkernels: setuptools {setuptools.__version__} is too old; `pip install --upgrade setuptools`.")
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent.resolve()
TORCH_ABI = "0x020a000000000000"  # LibTorch 2.10
DEFAULT_ARCHES = "8.0;8.6;8.9;9.0a;10.0a;12.0+PTX"
OLDEST_GXX = 11  # with all of C++20 that the sources take
OLDEST_CUDA = (12, 8)  # with 10.0a and 12.0, and with --compress-mode
COMMON_FLAGS = [f"-DTORCH_TARGET_VERSION={TORCH_ABI}", "-std=c++20", "-O3"]
CXX_FLAGS = [
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-Wall",
    *("-Wno-maybe-uninitialized", "-Wno-uninitialized"),  # of which gcc 12's own AVX-512 headers give 500
]
AVX512_FLAGS = [
    "-DCPU_CAPABILITY_AVX512",
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma", "-mf16c"),
    "-mprefer-vector-width=512",
]
ISA_FLAGS = {
    "baseline": ["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"],
    "avx2": ["-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2", "-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-DCPU_CAPABILITY=AVX512", *AVX512_FLAGS],
    "amx": ["-DCPU_CAPABILITY=AMX", "-DCPU_CAPABILITY_AMX", *AVX512_FLAGS, "-mamx-tile", "-mamx-bf16"],
}
NVCC_FLAGS = [
    *COMMON_FLAGS,
    "-DUSE_CUDA",
    "--compress-mode=size",
    "--expt-relaxed-constexpr",
    *("-Xcompiler", "-fPIC,-fvisibility=hidden"),
]
RUNTIME_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-pthread"]
# The static library, so that what is built runs where liburing is not installed.
LIBURING_LINK = ["-l:liburing.a", "-Wl,--exclude-libs,liburing.a"]
# The kernels with matrix products of their own: the others gain nothing by AMX.
AMX_SOURCES = ("attention_bwd", "attention_fwd")


RUNTIME = f"_runtime{sysconfig.get_config_var('EXT_SUFFIX')}"


def require(condition, message):
    if not condition:
        sys.exit(f"memkernels: {message}")


def find_nvcc():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidate = Path(home) / "bin" / "nvcc" if home else None
    return str(candidate) if candidate and candidate.exists() else shutil.which("nvcc")


def targets(nvcc):
    """The libraries to build: what MEMKERNELS_BUILD names, or all for which everything is here."""
    asked = os.environ.get("MEMKERNELS_BUILD")
    if asked is None:
        if lacking := missing_for_runtime():
            print(f"memkernels: built without offload, for {lacking}", file=sys.stderr)
        lacking_cuda = missing_for_cuda(nvcc)
        if nvcc and lacking_cuda:
            print(f"memkernels: built without CUDA kernels, for {lacking_cuda}", file=sys.stderr)
        return ["cpu", *([] if lacking else ["runtime"]), *([] if lacking_cuda else ["cuda"])]
    names = [name.strip() for name in asked.split(",") if name.strip()]
    unknown = set(names) - {"cpu", "cuda", "runtime", "none"}
    require(names and not unknown, f"MEMKERNELS_BUILD={asked!r}: it takes none, or several of cpu, cuda and runtime.")
    require("none" not in names or len(names) == 1, f"MEMKERNELS_BUILD={asked!r}: none stands alone.")
    return [name for name in names if name != "none"]


def missing_for_runtime():
    """What csrc/runtime needs and is not here, in a sentence; None where all is."""
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is missing; `pip install pybind11`."
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python.h is missing; install Python's headers (Debian: apt-get install python3-dev)."
    return None


def missing_for_cuda(nvcc):
    """What csrc/cuda needs and is not here, in a sentence; None where all is."""
    if not nvcc:
        return "no nvcc; install the CUDA toolkit, set CUDA_HOME, or MEMKERNELS_BUILD=cpu."
    release = re.search(r"release (\d+)\.(\d+)", version_of(nvcc))
    if release and tuple(map(int, release.groups())) < OLDEST_CUDA:
        oldest = ".".join(map(str, OLDEST_CUDA))
        return f"nvcc {release[1]}.{release[2]} is too old; install CUDA {oldest} or newer, or set CUDA_HOME to it."
    return None


def is_new_enough(cxx):
    """Whether a compiler is a g++ of OLDEST_GXX or newer, or clang."""
    program = f"#if !defined(__clang__) && __GNUC__ < {OLDEST_GXX}\n#error\n#endif\n"
    return subprocess.run([cxx, "-x", "c++", "-E", "-"], input=program, text=True, capture_output=True).returncode == 0


def has_liburing(cxx):
    """Whether a shared library can be made of it here."""
    program = "#include <liburing.h>\nint depth(io_uring* ring) { return io_uring_queue_init(1, ring, 0); }\n"
    with tempfile.TemporaryDirectory() as folder:
        command = [cxx, "-shared", "-fPIC", "-x", "c++", "-", *LIBURING_LINK, "-o", str(Path(folder, "linked.so"))]
        return subprocess.run(command, input=program, text=True, capture_output=True).returncode == 0


def gencode_flags(arch_list):
    """nvcc's flags for a list such as `8.0;9.0a+PTX`."""
    flags = []
    for arch in arch_list.replace(",", ";").replace(" ", ";").split(";"):
        if not arch:
            continue
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        require(match, f"TORCH_CUDA_ARCH_LIST: {arch!r} is not an architecture; write it as 8.0, 9.0a or 12.0+PTX.")
        major, minor, suffix, ptx = match.groups()
        number = f"{major}{minor}{suffix}"
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    require(flags, "TORCH_CUDA_ARCH_LIST is empty; leave it unset for the default.")
    return flags


class Ninja:
    """Collects rules and builds of one ninja file."""

    def __init__(self, build_dir):
        self.build_dir = build_dir
        self.lines = ["ninja_required_version = 1.5"]

    def rule(self, name, command, depfile):
        self.lines.append(f"rule {name}\n  command = {command}\n  description = {name} $out")
        if depfile:
            self.lines.append("  depfile = $out.d\n  deps = gcc")

    def build(self, output, rule, inputs):
        escaped = " ".join(str(path).replace(" ", "$ ") for path in inputs)
        self.lines.append(f"build {str(output).replace(' ', '$ ')}: {rule} {escaped}")

    def run(self, ninja, jobs):
        self.build_dir.mkdir(parents=True, exist_ok=True)
        path = self.build_dir / "build.ninja"
        text = "\n".join(self.lines) + "\n"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        command = [ninja, "-C", str(self.build_dir), *(["-j", jobs] if jobs else [])]
        if subprocess.call(command) != 0:
            sys.exit("memkernels: the native build failed; the first error above names the file.")


def quoted(flags):
    return " ".join(f"'{flag}'" if " " in str(flag) else str(flag) for flag in flags)


def version_of(command):
    """The line of a compiler's --version that holds its version."""
    lines = subprocess.run([command, "--version"], capture_output=True, text=True).stdout.strip().splitlines()
    return next((line for line in lines if "release" in line), lines[0] if lines else "unknown")


class build_native(build_ext):
    def run(self):
        nvcc = find_nvcc()
        libraries = targets(nvcc)
        destination = ROOT / "memkernels" if self.inplace or self.editable_mode else Path(self.build_lib) / "memkernels"
        destination.mkdir(parents=True, exist_ok=True)
        if libraries:
            self.build(libraries, nvcc, destination)

    def build(self, libraries, nvcc, destination):
        try:
            import torch
            from torch.utils.cpp_extension import include_paths
        except ImportError:
            sys.exit("memkernels: torch is missing; `pip install torch`, then build with --no-build-isolation.")
        version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
        require(version >= (2, 10), f"torch {torch.__version__} is too old; memkernels needs torch 2.10 or newer.")
        ninja = shutil.which("ninja") or str(Path(sys.executable).with_name("ninja"))
        require(Path(ninja).exists(), "ninja is missing; `pip install ninja`.")
        cxx = shutil.which(os.environ.get("CXX", "g++"))
        install = f"install g++ {OLDEST_GXX} or newer, or name one with CXX."
        require(cxx, f"no C++ compiler; {install}")
        require(is_new_enough(cxx), f"{version_of(cxx)} is too old; {install}")
        lacking_cuda = missing_for_cuda(nvcc)
        require("cuda" not in libraries or lacking_cuda is None, lacking_cuda)
        jobs = os.environ.get("MAX_JOBS")
        require(not jobs or re.fullmatch(r"0*[1-9]\d*", jobs), f"MAX_JOBS={jobs!r}: it takes a positive number.")
        lacking = missing_for_runtime()
        require("runtime" not in libraries or lacking is None, f"{lacking} Or name others: MEMKERNELS_BUILD=cpu.")

        torch_lib = Path(torch.__file__).parent / "lib"
        # include_paths() is torch's own include folders; csrc is ours.
        includes = [f"-I{ROOT / 'csrc'}", *(f"-isystem {path}" for path in include_paths())]
        link = f"-L{torch_lib} -Wl,--no-as-needed -ltorch -ltorch_cpu"
        script = Ninja(Path(self.build_temp).resolve() / "native")
        outputs, info = {}, {"torch": torch.__version__, "cxx": version_of(cxx), "libraries": libraries}
        if "cpu" in libraries:
            outputs["_C_cpu.so"] = self.cpu_library(script, cxx, includes, link)
            info |= {"cpu_flags": COMMON_FLAGS + CXX_FLAGS, "instruction_sets": self.isas()}
        if "cuda" in libraries:
            arches = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHES
            flags = NVCC_FLAGS + gencode_flags(arches)
            outputs["_C_cuda.so"] = self.cuda_library(script, cxx, nvcc, includes, link, flags)
            info |= {"nvcc": version_of(nvcc), "cuda_architectures": arches, "cuda_flags": flags}
        if "runtime" in libraries:
            liburing = has_liburing(cxx)
            flags = [*RUNTIME_FLAGS, *(["-DMEMKERNELS_LIBURING"] if liburing else [])]
            outputs[RUNTIME] = self.runtime_library(script, cxx, flags, LIBURING_LINK if liburing else [])
            info |= {"python": platform.python_version(), "runtime_flags": flags}
            info["io_uring"] = "by liburing" if liburing else "no liburing found (Debian: apt-get install liburing-dev)"
        script.run(ninja, jobs)
        for name, built in outputs.items():
            target = destination / name
            temporary = target.with_suffix(".new")
            shutil.copy2(built, temporary)
            os.replace(temporary, target)  # a process that has the old library mapped keeps it
        (destination / "build_info.json").write_text(json.dumps(info, indent=2) + "\n")

    @staticmethod
    def isas():
        x86 = platform.machine() in ("x86_64", "AMD64")
        return {name: flags for name, flags in ISA_FLAGS.items() if x86 or name == "baseline"}

    def cpu_library(self, script, cxx, includes, link):
        objects = []
        for isa, flags in self.isas().items():
            script.rule(
                f"cxx_{isa}",
                f"{cxx} -MMD -MF $out.d {quoted(COMMON_FLAGS + CXX_FLAGS + flags)} {' '.join(includes)} -c $in -o $out",
                depfile=True,
            )
        # Baseline objects first: of the inline functions that several builds share, the linker keeps the first.
        for isa in self.isas():
            for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
                if (isa != "baseline" and source.stem == "isa") or (isa == "amx" and source.stem not in AMX_SOURCES):
                    continue
                objects.append(Path(isa) / f"{source.stem}.o")
                script.build(objects[-1], f"cxx_{isa}", [source])
        objects.insert(0, Path("library.o"))
        script.build(objects[0], "cxx_baseline", [ROOT / "csrc" / "library.cpp"])
        script.rule("link_cpu", f"{cxx} -shared $in {link} -o $out", depfile=False)
        script.build("_C_cpu.so", "link_cpu", objects)
        return script.build_dir / "_C_cpu.so"

    def cuda_library(self, script, cxx, nvcc, includes, link, flags):
        compile_ = f"{nvcc} -ccbin {cxx} -MD -MF $out.d {quoted(flags)} {' '.join(includes)}"
        script.rule("nvcc", f"{compile_} -c $in -o $out", depfile=True)
        sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
        objects = [Path("cuda") / f"{source.stem}.o" for source in sources]
        for source, output in zip(sources, objects, strict=True):
            script.build(output, "nvcc", [source])
        script.rule(
            "link_cuda",
            f"{nvcc} -ccbin {cxx} -shared -cudart static $in {link.replace('-Wl,', '-Xlinker ')} -o $out",
            depfile=False,
        )
        script.build("_C_cuda.so", "link_cuda", objects)
        return script.build_dir / "_C_cuda.so"

    def runtime_library(self, script, cxx, flags, link):
        import pybind11

        headers = pybind11.get_include(), sysconfig.get_path("include")
        includes = [f"-I{ROOT / 'csrc'}", *(f"-isystem {path}" for path in headers)]
        command = f"{cxx} -MMD -MF $out.d {quoted(flags)} {' '.join(includes)} -c $in -o $out"
        script.rule("cxx_runtime", command, depfile=True)
        sources = sorted((ROOT / "csrc" / "runtime").glob("*.cpp"))
        objects = [Path("runtime") / f"{source.stem}.o" for source in sources]
        for source, output in zip(sources, objects, strict=True):
            script.build(output, "cxx_runtime", [source])
        script.rule("link_runtime", f"{cxx} -shared -pthread $in {' '.join(link)} -o $out", depfile=False)
        script.build(RUNTIME, "link_runtime", objects)
        return script.build_dir / RUNTIME

    def get_outputs(self):
        folder = Path(self.build_lib) / "memkernels"
        names = ("_C_cpu.so", "_C_cuda.so", RUNTIME, "build_info.json")
        return [str(folder / name) for name in names if (folder / name).exists()]

    def get_output_mapping(self):
        return {}


class native_wheel(bdist_wheel):
    def get_tag(self):
        # The operators' libraries use torch's stable ABI and no Python API: one wheel serves every Python. Offload
        # alone needs the Python that built it, and says so elsewhere.
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(
        # Named so that setuptools knows this distribution is not pure Python; build_native decides what is built.
        ext_modules=[Extension("memkernels._C_cpu", sources=[])],
        cmdclass={"build_ext": build_native, "bdist_wheel": native_wheel},
    )
