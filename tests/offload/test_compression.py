"""Fewer bits for what moves: gradients are those of the rounded values."""

import pytest
import torch

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


def test_views_share_what_was_compressed_and_other_dtypes_do_not(tmp_path):
    offload = offload_activations("auto", path=tmp_path, max_host_bytes=1 << 20, min_bytes=KB, compress="fp8")
    offload._store._host.limit = 0
    x = torch.randn(64, 64, requires_grad=True)
    with offload:
        h = (x * 1).exp()
        y = (h.t() * h[:32].repeat(2, 1)).sum()
    y.backward()
    assert torch.isfinite(x.grad).all() and offload.statistics["shared"] >= 1


def test_an_unknown_compression_is_named():
    with pytest.raises(ValueError, match="compress: expected None, bf16 or fp8, got 'int4'"):
        offload_activations("disk", compress="int4")
