"""Fewer bits for what moves: gradients are those of the rounded values."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from offloaded_model import disk

from memkernels import ops
from memkernels.nn import Attention
from memkernels.offload import offload_activations
from memkernels.offload.compression import Codec, codec_for

pytest.importorskip("memkernels._runtime", reason="built without pybind11 or Python's headers")

KB = 1 << 10
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def spread(n, dtype=torch.float32, seed=0):
    """Values of many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, generator=generator) * torch.exp(2 * torch.randn(n, generator=generator))).to(dtype)


def test_bfloat16_of_float32_is_within_its_error():
    values = spread(4096)
    codec = Codec("bf16", torch.float32)
    encoded = codec.encode(values.view(torch.uint8))
    back = codec.decode(encoded, 4 * 4096).view(torch.float32)
    assert encoded.numel() == 2 * 4096 and ((back - values).abs() <= values.abs() / 256).all()


def test_bfloat16_of_extreme_values_is_as_stated():
    """Every exponent of float32, down to its least value and up to its largest, and what is not finite."""
    bits = torch.arange(0, 0x7F800000, 0x3FFF, dtype=torch.int32)
    bits = torch.cat([bits, torch.arange(300, dtype=torch.int32), torch.arange(0x7F7F0000, 0x7F800000, 0x7F).int()])
    values = torch.cat([bits.view(torch.float32), -bits.view(torch.float32)])
    codec = Codec("bf16", torch.float32)
    back = codec.decode(codec.encode(values.view(torch.uint8)), 4 * len(values)).view(torch.float32)
    exact, found, largest = values.double(), back.double(), torch.finfo(torch.bfloat16).max
    infinite = exact.abs() >= (largest + 2.0**128) / 2
    assert infinite.any() and torch.equal(back.isinf(), infinite) and torch.equal(back.signbit(), values.signbit())
    assert ((found - exact).abs() <= (exact.abs() / 256).clamp(min=2.0**-134))[~infinite].all()
    assert ((found - exact).abs() > exact.abs() / 256)[~infinite].any()
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0])
    back = codec.decode(codec.encode(odd.view(torch.uint8)), 16).view(torch.float32)
    assert torch.equal(back[[0, 1, 3]], odd[[0, 1, 3]]) and back[3].signbit() and back[2].isnan()


def test_which_tensors_are_compressed():
    x = torch.randn(8, 16)
    assert codec_for(None, x) is None and codec_for("bf16", x.bfloat16()) is None
    assert codec_for("fp8", x.double()) is None and codec_for("fp8", x.int()) is None
    for dtype in DTYPES:
        assert codec_for("fp8", x.to(dtype).t()) == Codec("fp8", dtype)
    assert codec_for("fp8", x[:, :3]) is None and codec_for("fp8", x[:1].expand(4, 16)) is None


@pytest.mark.parametrize(
    ("compress", "dtype", "nbytes"),
    [
        ("bf16", torch.float32, 2 * 20000),
        ("bf16", torch.bfloat16, 2 * 20000),
        ("fp8", torch.float32, 20032 + 4 * 157),
        ("fp8", torch.bfloat16, 20032 + 4 * 157),
    ],
)
def test_gradients_are_those_of_the_rounded_values(tmp_path, compress, dtype, nbytes):
    x = spread(20000).to(dtype).clamp(-4, 4).view(100, 200).requires_grad_()
    offload = offload_activations("auto", path=tmp_path, max_host_bytes=1 << 20, min_bytes=KB, compress=compress)
    offload._store._host.limit = 0  # all of it to disk
    with offload:
        y = x.exp()
    assert torch.equal(y, x.exp())
    assert offload.statistics["disk_bytes_written"] == nbytes
    (gradient,) = torch.autograd.grad(y.sum(), x)
    codec = codec_for(compress, y.detach())
    expected = y.detach()
    if codec is not None:
        raw = expected.contiguous().view(-1).view(torch.uint8)
        expected = codec.decode(codec.encode(raw), raw.numel()).view(dtype).view(100, 200)
    assert torch.equal(gradient, expected)
    assert (codec is None) == torch.equal(gradient, y)


def rounded(tensor, compress):
    """What comes of a tensor that was compressed."""
    codec = codec_for(compress, tensor)
    raw = tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)
    values = codec.decode(codec.encode(raw), raw.numel()).view(tensor.dtype)
    return values.as_strided(tensor.shape, tensor.stride())


@pytest.mark.parametrize("compress", ["bf16", "fp8"])
@pytest.mark.parametrize("attention", ["memkernels", "torch"])
def test_attentions_statistics_are_exact(tmp_path, attention, compress):
    """lse of about 10, kept as values are, would scale all weights of a row by up to exp(10 / 16)."""
    generator = torch.Generator().manual_seed(0)
    leaves = [4 * torch.randn(1, 512, 2, 16, generator=generator) for _ in range(3)]
    dout = torch.randn(1, 512, 2, 16, generator=generator)

    def gradients(q, k, v, offload):
        q, k, v = (t.clone().requires_grad_() for t in (q, k, v))
        with offload or contextlib.nullcontext():
            if attention == "memkernels":
                out = ops.attention(*(t * 1 for t in (q, k, v)), causal=True)
            else:
                moved = (t.transpose(1, 2).contiguous() for t in (q, k, v))
                out = F.scaled_dot_product_attention(*moved, is_causal=True).transpose(1, 2)
        out.backward(dout)
        return q.grad, k.grad, v.grad

    def of_rounded_values():
        class Rounds(torch.autograd.graph.saved_tensors_hooks):
            def __init__(self):
                super().__init__(lambda t: rounded(t, compress) if t.dim() == 4 else t, lambda t: t)

        return Rounds()

    offload = disk(tmp_path, compress=compress)
    found = gradients(*leaves, offload)
    expected = gradients(*leaves, of_rounded_values())
    assert offload.statistics["moved"] == 5
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert not torch.equal(found[2], gradients(*leaves, None)[2])


def test_statistics_of_norms_and_tables_are_exact(tmp_path):
    x, table = spread(20000).view(1000, 20).requires_grad_(), torch.randn(1000, 20).cos()
    with disk(tmp_path, compress="fp8") as offload:
        y = F.layer_norm(x * table, (20,))
    saved = y.grad_fn
    assert offload.statistics["moved"] == 4  # the table, the norm's argument, its means and their deviations
    h = (x * table).detach()
    assert torch.equal(saved._saved_input, rounded(h, "fp8"))
    _, mean, rstd = torch.native_layer_norm(h, (20,), None, None, 1e-5)
    assert torch.equal(saved._saved_result1, mean) and torch.equal(saved._saved_result2, rstd)


def test_what_blocks_keep_of_their_own_is_compressed(tmp_path):
    torch.manual_seed(0)
    layer, x = Attention(64, 4), torch.randn(1, 256, 64, requires_grad=True)
    written = []
    for compress in (None, "fp8"):
        offload = disk(tmp_path, compress=compress, keep_last_layers=0)
        with offload:
            layer(x * 1)
        written.append(offload.statistics["disk_bytes_written"])
    values, statistics = 2 * 256 * 64, 4 * 256  # x and out; lse
    assert written == [4 * (values + statistics), values * (128 + 4) // 128 + 4 * statistics]


def test_views_share_what_was_compressed_and_those_of_other_dtypes_do_not(tmp_path):
    offload = offload_activations("auto", path=tmp_path, max_host_bytes=1 << 20, min_bytes=KB, compress="fp8")
    offload._store._host.limit = 0
    x = torch.randn(64, 64, requires_grad=True)
    with offload:
        h = (x * 1).exp()
        pairs = torch.view_as_complex(h.view(64, 32, 2))
        y = (h.t() * h[:32].repeat(2, 1)).sum() + (pairs * pairs).real.sum()
    y.backward()
    # exp's result and its transpose; the repeated rows; the pairs, twice.
    assert (offload.statistics["moved"], offload.statistics["shared"]) == (3, 2)
    kept, repeated = rounded(h, "fp8"), rounded(h[:32].repeat(2, 1), "fp8")
    dh = repeated.t() + torch.view_as_real(2 * pairs.detach().conj()).view(64, 64)
    dh[:32] += kept.t()[:32] + kept.t()[32:]
    torch.testing.assert_close(x.grad, dh * kept)


def test_an_unknown_compression_is_named():
    with pytest.raises(ValueError, match="compress: expected None, bf16 or fp8, got 'int4'"):
        offload_activations("disk", compress="int4")
