"""CUDA C++ operators on CPU tensors: csrc/cuda/*.cu with their torch wrappers, compiled by g++ against csrc/simt."""

from __future__ import annotations

import math
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from memkernels import ops
from memkernels.ops.linear_cross_entropy import reference, tiles
from memkernels.testing import check_op, random_tensor

CSRC = Path(__file__).parents[2] / "csrc"
OPERATORS = ("cross_entropy_stats", "cross_entropy_grad_")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALL_OPTIONS = {"softcap": 3.0, "label_smoothing": 0.1, "z_loss": 1e-2}

pytestmark = pytest.mark.xdist_group("simt_operators")  # one library, compiled once


@pytest.fixture(scope="module")
def simt(tmp_path_factory: pytest.TempPathFactory):
    """`torch.ops.memkernels_simt`: the operators of OPERATORS by the CUDA kernels."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed; it compiles CUDA kernels for the CPU here")
    library = tmp_path_factory.mktemp("simt") / "operators.so"
    torch_lib = Path(torch.__file__).parent / "lib"
    command = [compiler, "-x", "c++", "-std=c++20", "-O1", "-pthread", "-fPIC", "-shared", "-Wno-unknown-pragmas"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-I", CSRC / "simt", "-I", CSRC]
    command += [part for path in include_paths() for part in ("-isystem", path)]
    command += [*sorted((CSRC / "cuda").glob("*.cu")), "-o", library, f"-L{torch_lib}", "-ltorch", "-ltorch_cpu"]
    compiled = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert compiled.returncode == 0, compiled.stderr
    definitions = torch.library.Library("memkernels_simt", "DEF")
    for name in OPERATORS:
        schema = str(getattr(torch.ops.memkernels, name).default._schema)
        definitions.define(schema.removeprefix("memkernels::"))
    torch.ops.load_library(library)
    yield torch.ops.memkernels_simt
    definitions._destroy()


@pytest.fixture
def calls(simt) -> Iterator[list[str]]:
    """Puts the CUDA kernels in the place of the native CPU ones, and lists the calls that reach them."""
    library = torch.library.Library("memkernels", "IMPL")
    made: list[str] = []

    def counted(name):
        def call(*args):
            made.append(name)
            return getattr(simt, name)(*args)

        return call

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a kernel is overridden, which is the point
        for name in OPERATORS:
            library.impl(name, counted(name), "CPU", allow_override=True)
    yield made
    library._destroy()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["plain", "all-options"])
def test_linear_cross_entropy_matches_reference(calls, dtype, options):
    inputs = {
        "x": random_tensor(3, 7, 60, dtype=dtype, seed=1),
        "weight": random_tensor(131, 60, dtype=dtype, seed=2, scale=60**-0.5),
        "target": (torch.arange(21) * 50 % 131).view(3, 7),
    }
    inputs["target"][1, 2:5] = -100
    with mock.patch.object(tiles, "tile_columns", lambda x, rows, vocab_size: 77):
        check_op(ops.linear_cross_entropy, reference.linear_cross_entropy, inputs, reduction="none", **options)
    assert set(calls) == set(OPERATORS)


def row_state(rows):
    return [torch.full((rows,), -math.inf), *(torch.zeros(rows) for _ in range(3))]


def test_rows_of_a_wider_tensor(simt):
    wide = random_tensor(6, 50, dtype=torch.float32, seed=1).detach()
    tile, target = wide[:, 7:40], torch.tensor([0, 32, -100, 40, 5, 17])
    got, exact = row_state(6), [state.double() for state in row_state(6)]
    simt.cross_entropy_stats(tile, target, 0, 60, -100, 0.0, *got)
    reference.cross_entropy_stats(tile.double(), target, 0, 60, -100, 0.0, *exact)
    for ours, theirs in zip(got, exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-6)

    lse, grad_loss, before = exact[0] + exact[1].log(), torch.linspace(-1, 2, 6), wide.clone()
    expected = before.double()
    reference.cross_entropy_grad_(expected[:, 7:40], target, 0, 60, lse, grad_loss.double(), -100, 0.0, 0.1, 0.01)
    simt.cross_entropy_grad_(tile, target, 0, 60, lse.float(), grad_loss, -100, 0.0, 0.1, 0.01)
    torch.testing.assert_close(wide.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(wide[:, :7], before[:, :7]) and torch.equal(wide[:, 40:], before[:, 40:])


def test_bad_arguments_are_named(simt):
    logits, target = torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="logits: expected columns of stride 1, got stride 4"):
        simt.cross_entropy_stats(torch.zeros(8, 4).t(), target, 0, 8, -100, 0.0, *row_state(4))
    with pytest.raises(RuntimeError, match=r"logits: expected .*, got 1 dimensions"):
        simt.cross_entropy_stats(torch.zeros(4), target, 0, 8, -100, 0.0, *row_state(4))
    with pytest.raises(RuntimeError, match="row_max: expected 4 contiguous elements, one per row of logits, got 3"):
        simt.cross_entropy_stats(logits, target, 0, 8, -100, 0.0, *row_state(3))
    with pytest.raises(RuntimeError, match="lse: expected 4 contiguous elements"):
        simt.cross_entropy_grad_(logits, target, 0, 8, torch.zeros(8)[::2], torch.zeros(4), -100, 0.0, 0.0, 0.0)
    with pytest.raises(RuntimeError, match="expected float32, bfloat16 or float16"):
        simt.cross_entropy_stats(logits.double(), target, 0, 8, -100, 0.0, *row_state(4))
    with pytest.raises(RuntimeError, match="target out of range"):
        simt.cross_entropy_stats(logits, target + 8, 0, 8, -100, 0.0, *row_state(4))
