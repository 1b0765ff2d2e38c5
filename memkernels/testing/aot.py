"""Compiles Triton kernels ahead of time for GPUs that this machine does not have, and reads off what they need.

A case's launcher runs on meta tensors while `JITFunction.run` only records, so each kernel is compiled with the
arguments, specialisation and options of its real launch. Kernels must have been decorated without TRITON_INTERPRET;
`kernel_table` starts processes for that. Triton's own cache keeps what was compiled.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from memkernels.testing.cases import KernelCase, Target, kernel_cases
from memkernels.testing.triton_resources import Resources, amd_resources, nvidia_resources


class Launch(NamedTuple):
    """A recorded launch: the kernel, its arguments by position, and by name together with the compile options."""

    kernel: JITFunction
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Inside it launching a Triton kernel runs nothing and adds a Launch to the list."""
    launches: list[Launch] = []

    def record(kernel, *args, grid, warmup, **kwargs):
        launches.append(Launch(kernel, args, kwargs))

    with mock.patch.object(JITFunction, "run", record):
        yield launches


def case_launches(case: KernelCase) -> list[Launch]:
    """The launches of `case`, recorded.

    Raises:
        RuntimeError: TRITON_INTERPRET is set, or no kernel was launched.
    """
    return _record(case)[0]


def _record(case: KernelCase) -> tuple[list[Launch], tuple[Tensor, ...]]:
    """The launches, and what the case returns."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError(
            "TRITON_INTERPRET is set, so there is nothing to compile; see kernel_table.triton_processes."
        )
    with recorded_launches() as launches:
        moved = case.launch("meta")
    if not launches:
        raise RuntimeError(f"{case.label}: no Triton kernel was launched; is the input empty?")
    return launches, moved


def case_source(case: KernelCase) -> str:
    """A hash of what a case's figures follow from: its kernels and all that they call, their arguments, and Triton."""
    launches, moved = _record(case)
    least = sum(tensor.nbytes for tensor in moved)
    parts = [triton.__version__, *map(str, case.targets), least, case.traffic_limit]
    parts += [(_code(kernel), _described(args), _described(kwargs)) for kernel, args, kwargs in launches]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:8]


def _code(function: JITFunction) -> dict[str, str]:
    """The text of a function and of those that it calls, and the constants they read, by name.

    Triton's own hash of them differs between processes where two modules have a constant of one name.
    """
    used = sorted(inspect.getclosurevars(function.fn).globals.items())
    code = {f"{function.fn.__module__}.{function.__name__}": function.src}
    code |= {name: repr(value) for name, value in used if isinstance(value, tl.constexpr)}
    for _, value in used:
        if isinstance(value, JITFunction):
            code |= _code(value)
    return code


def _described(argument: Any) -> Any:
    """An argument with a tensor's layout in its place."""
    if isinstance(argument, Tensor):
        return argument.dtype, tuple(argument.shape), argument.stride()
    if isinstance(argument, TensorDescriptor):
        return _described(argument.base), argument.block_shape
    if isinstance(argument, dict):
        return [(name, _described(value)) for name, value in argument.items()]
    return tuple(map(_described, argument)) if isinstance(argument, tuple) else argument


def launched_kernels(op: str) -> set[tuple[str, str]]:
    """The kernels that the cases of `op` launch, each as its module and name."""
    launches = [launch for case in kernel_cases(op) for launch in case_launches(case)]
    return {(launch.kernel.fn.__module__, launch.kernel.__name__) for launch in launches}


def compile_launch(launch: Launch, target: Target) -> Resources:
    """Compiles one launch as Triton's just-in-time path would on `target`."""
    kernel, args, kwargs = launch
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    backend = make_backend(gpu)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*args, **kwargs)
    options, signature, constexprs, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
    source = ASTSource(kernel, signature, constexprs, attributes)
    compiled = triton.compile(source, target=gpu, options=options.__dict__)
    if target.backend == "cuda":
        asm = compiled.asm
        return nvidia_resources(asm["cubin"], asm["ptx"], asm["ttir"], compiled.metadata.shared)
    return amd_resources(compiled.asm["amdgcn"], compiled.asm["ttir"], compiled.metadata.shared)


def compile_case(case: KernelCase, target: Target) -> dict[str, Resources]:
    """Compiles every kernel that `case` launches for `target`.

    Returns:
        Resources by the kernel's name.

    Raises:
        RuntimeError: as `case_launches`, or one kernel was launched in two configurations.
    """
    compiled: dict[str, Resources] = {}
    for launch in case_launches(case):
        name, resources = launch.kernel.__name__, compile_launch(launch, target)
        if compiled.setdefault(name, resources) != resources:
            raise RuntimeError(f"{case.label}: {name} is launched in two configurations; make each a case of its own.")
    return compiled
