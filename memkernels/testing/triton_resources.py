"""Reads registers, shared memory, spills and tensor-core instructions out of a compiled Triton kernel."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

_NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# An address, perhaps a predicate, and then the opcode up to its first dot.
_SASS_OPCODE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)
_DOT = re.compile(r"\btt\.dot(?:_scaled)?\b.*")
# PTX of a product that rounds float32 operands: mma.sync and wgmma name their operands' types, tcgen05 a kind.
_TF32_PRODUCT = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\S*tf32")


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs: facts of the compiler, not measurements on a GPU.

    Attributes:
        registers: 32-bit registers per thread; on AMD vector and accumulation registers.
        shared_bytes: shared memory per block (AMD: LDS).
        stack_bytes: local memory per thread (AMD: scratch); where spilled registers go.
        spills: instructions that load or store local memory; on AMD spilled vector and scalar registers.
        tensor_cores: how many instructions of which kind the code holds (not executes): HMMA up to sm_89 and on sm_120,
            HGMMA on sm_90, UTCHMMA on sm_100, and their kin; on AMD v_mfma.
        async_copies: instructions that copy from global to shared memory without registers between (not TMA).
        tma_copies: loads, stores and reductions by the tensor memory accelerator.
        multiplies: the kernel holds a tl.dot that the target's tensor cores can do (not IEEE float32 on NVIDIA).
        rounded_products: instructions that multiply float32 as tf32, if no tl.dot of the kernel asks for it.
    """

    registers: int
    shared_bytes: int
    stack_bytes: int
    spills: int
    tensor_cores: dict[str, int]
    async_copies: int
    tma_copies: int
    multiplies: bool
    rounded_products: int


def nvidia_resources(cubin: bytes, ptx: str, ttir: str, dynamic_shared_bytes: int) -> Resources:
    """Resources of a cubin with one kernel, by `cuobjdump --dump-resource-usage` and `nvdisasm`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = _run_tool("cuobjdump", "--dump-resource-usage", str(path))
        opcodes = Counter(_SASS_OPCODE.findall(_run_tool("nvdisasm", "-c", str(path))))
    figures = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    dots = _DOT.findall(ttir)
    return Resources(
        registers=figures["REG"],
        shared_bytes=figures["SHARED"] + dynamic_shared_bytes,
        stack_bytes=figures["STACK"] + figures["LOCAL"],
        spills=opcodes["LDL"] + opcodes["STL"],
        tensor_cores={name: count for name, count in opcodes.items() if name.endswith("MMA")},
        async_copies=opcodes["LDGSTS"],
        tma_copies=sum(opcodes[name] for name in ("UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP")),
        multiplies=any(not re.search(r": tensor<[\dx]+xf(32|64)>", dot) or "inputPrecision" in dot for dot in dots),
        rounded_products=0 if any("inputPrecision" in dot for dot in dots) else len(_TF32_PRODUCT.findall(ptx)),
    )


def amd_resources(amdgcn: str, ttir: str, dynamic_shared_bytes: int) -> Resources:
    """Resources of an assembly file with one kernel, by its metadata and text."""
    figures = {name: int(value) for name, value in re.findall(r"^\s*(?:- )?\.(\w+):\s+(\d+)$", amdgcn, re.MULTILINE)}
    multiplications = len(re.findall(r"^\s+v_mfma_", amdgcn, re.MULTILINE))
    return Resources(
        registers=figures["vgpr_count"],
        shared_bytes=figures["group_segment_fixed_size"] + dynamic_shared_bytes,
        stack_bytes=figures["private_segment_fixed_size"],
        spills=figures["vgpr_spill_count"] + figures["sgpr_spill_count"],
        tensor_cores={"v_mfma": multiplications} if multiplications else {},
        async_copies=len(re.findall(r"^\s+(?:global_load_lds_|buffer_load_\w+ .*\blds$)", amdgcn, re.MULTILINE)),
        tma_copies=0,
        multiplies=bool(_DOT.search(ttir)),
        rounded_products=len(re.findall(r"^\s+v_mfma_\w*xf32", amdgcn, re.MULTILINE)),
    )


def _run_tool(name: str, *arguments: str) -> str:
    command = [str(_NVIDIA_TOOLS / name), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
