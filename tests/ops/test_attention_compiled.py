"""ops.attention under torch.compile, and its operators by opcheck."""

import pytest
import torch
from attention_inputs import make_inputs, make_slopes, starts
from compilers import check_compiled

from memkernels import ops
from memkernels.testing import implementations

IMPLEMENTATIONS = implementations("attention_fwd")
on_every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)


@on_every_implementation
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed, ALiBi"])
def test_opcheck(implementation, packed):
    with implementation.active() as device:
        inputs = make_inputs(torch.bfloat16, device, queries=9, keys=11, size=16, packed=packed)
        q, k, v = (tensor.detach() for tensor in inputs.values())
        sinks, seed = torch.zeros(4, device=device), torch.tensor(5, device=device)
        of_sequences = (None, None, None)
        if packed:
            of_sequences = (starts(0, 4, 9).to(device), starts(0, 6, 11).to(device), make_slopes(2, 4, device=device))
        masks = (*of_sequences, sinks, seed, 9, 11, 0.25, -1, 0, 0.0, 0.1)
        torch.library.opcheck(torch.ops.memkernels.attention_fwd.default, (q, k, v, *masks))
        out, lse = torch.ops.memkernels.attention_fwd(q, k, v, *masks)
        arguments = (out, lse, q, k, v, out, lse, *masks, True)
        torch.library.opcheck(torch.ops.memkernels.attention_bwd.default, arguments)


def test_compiles_whole_and_equals_eager():
    def step(q, k, v):
        out, lse = ops.attention(q, k, v, causal=True, return_lse=True)
        return (out * 2).sum() + lse.sum()

    check_compiled(step, make_inputs(torch.float32, "cpu"))


def test_packed_sequences_compile_whole_and_bad_starts_are_named():
    """A graph does not read starts, so it asserts what eager calls check."""

    def step(q, k, v, cu_seqlens):
        options = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "max_seqlen_q": 5, "max_seqlen_k": 5}
        out, lse = ops.attention(q, k, v, causal=True, return_lse=True, **options)
        return (out * 2).sum() + lse.sum()

    compiled, results = torch.compile(step, fullgraph=True, backend="aot_eager"), []
    for function in (step, compiled):
        inputs = make_inputs(torch.float32, "cpu", queries=8, keys=8, size=16, packed=True)
        loss = function(**inputs, cu_seqlens=starts(0, 3, 3, 8))
        loss.backward()
        results.append([loss, *(tensor.grad for tensor in inputs.values())])
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager)
    for bad in ((1, 3, 5, 8), (0, 3, 5, 7), (0, 5, 3, 8), (0, 4, 5, 9), (0, 1, 2, 8)):
        with pytest.raises(
            RuntimeError, match="cu_seqlens_q: expected starts that rise from 0 to the number of rows by"
        ):
            compiled(**inputs, cu_seqlens=starts(*bad))


def test_packed_sequences_in_a_graph_need_their_longest_or_break_it():
    def step(q, k, v):
        return ops.attention(q, k, v, cu_seqlens_q=starts(0, 3, 8), cu_seqlens_k=starts(0, 3, 8))

    inputs = make_inputs(torch.float32, "cpu", queries=8, keys=8, size=16, packed=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="max_seqlen_q: expected a number under torch"):
        torch.compile(step, fullgraph=True, backend="aot_eager")(**inputs)
    torch.testing.assert_close(torch.compile(step, backend="aot_eager")(**inputs), step(**inputs))
