"""ops.linear_cross_entropy: every implementation against the float64 reference; what it saves, rejects, compiles to."""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from compilers import check_compiled
from hypothesis import given, settings
from hypothesis import strategies as st

from memkernels import nn, ops
from memkernels.ops.linear_cross_entropy import reference, tiles
from memkernels.testing import check_op, implementations, random_tensor, saved_bytes
from memkernels.testing.peak_memory import peak_bytes, run_in_child

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IMPLEMENTATIONS = implementations("cross_entropy_stats")
on_every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
ALL_OPTIONS = {"softcap": 3.0, "label_smoothing": 0.1, "z_loss": 1e-2}


def make_inputs(shape, vocab_size, dtype, device="cpu", *, bias=False, ignored=0.25):
    """x and weight for logits of size about 1, and labels of which a part is ignored."""
    size = shape[-1]
    inputs = {
        "x": random_tensor(*shape, dtype=dtype, device=device, seed=1),
        "weight": random_tensor(vocab_size, size, dtype=dtype, device=device, seed=2, scale=max(size, 1) ** -0.5),
    }
    generator = torch.Generator().manual_seed(3)
    target = torch.randint(0, vocab_size, shape[:-1], generator=generator)
    target[torch.rand(shape[:-1], generator=generator) < ignored] = -100
    inputs["target"] = target.to(device)
    if bias:
        inputs["bias"] = random_tensor(vocab_size, dtype=dtype, device=device, seed=4)
    return inputs


@contextmanager
def tiles_of(columns):
    with mock.patch.object(tiles, "tile_columns", lambda x, rows, vocab_size: min(columns, vocab_size)):
        yield


def gradients(loss, inputs):
    return torch.autograd.grad(loss, [tensor for tensor in inputs.values() if tensor.requires_grad])


@on_every_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 16, 37, 1000])
@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["plain", "all-options"])
def test_matches_reference(implementation, dtype, columns, options):
    with implementation.active() as device, tiles_of(columns):
        inputs = make_inputs((7, 9, 60), 131, dtype, device, bias=bool(options))
        check_op(ops.linear_cross_entropy, reference.linear_cross_entropy, inputs, reduction="none", **options)
        check_op(ops.linear_cross_entropy, reference.linear_cross_entropy, inputs, shift=True, **options)


@on_every_implementation
@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 20), st.integers(1, 40)),
    vocab_size=st.integers(1, 90),
    columns=st.integers(1, 90),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    reduction=st.sampled_from(["sum", "none", "num_items"]),
    softcap=st.sampled_from([None, 0.5, 30.0]),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    z_loss=st.sampled_from([0.0, 1e-4, 0.1]),
    shift=st.booleans(),
    strided_grads=st.booleans(),
)
def test_any_shape_and_options(implementation, shape, vocab_size, columns, dtype, bias, reduction, **options):
    if reduction == "num_items":  # Without it the mean over nothing but ignored tokens is NaN.
        options |= {"reduction": "mean", "num_items": 7}
    else:
        options["reduction"] = reduction
    with implementation.active() as device, tiles_of(columns):
        inputs = make_inputs(shape, vocab_size, dtype, device, bias=bias)
        check_op(ops.linear_cross_entropy, reference.linear_cross_entropy, inputs, roundings=2, atol=4e-6, **options)


@on_every_implementation
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_torch_cross_entropy(implementation, reduction):
    with implementation.active() as device, tiles_of(50):
        inputs = make_inputs((40, 24), 120, torch.float32, device, bias=True)
        inputs["target"] = inputs["target"].clamp(min=5)
        x, weight, target, bias = inputs.values()
        options = {"reduction": reduction, "label_smoothing": 0.1, "ignore_index": 5}
        ours = ops.linear_cross_entropy(x, weight, target, bias=bias, **options)
        theirs = F.cross_entropy(F.linear(x, weight, bias), target, **options)
        torch.testing.assert_close(ours, theirs)
        cotangent = torch.linspace(-1, 2, ours.numel(), device=device).view(ours.shape)
        for our, their in zip(
            torch.autograd.grad(ours, (x, weight, bias), cotangent),
            torch.autograd.grad(theirs, (x, weight, bias), cotangent),
            strict=True,
        ):
            torch.testing.assert_close(our, their)


@on_every_implementation
def test_a_scaled_loss_has_scaled_gradients(implementation):
    with implementation.active() as device, tiles_of(50):
        inputs = make_inputs((40, 24), 120, torch.float32, device)
        plain = gradients(ops.linear_cross_entropy(**inputs), inputs)
        scaled = gradients(ops.linear_cross_entropy(**inputs) * 0.25, inputs)
        for whole, quarter in zip(plain, scaled, strict=True):
            torch.testing.assert_close(quarter, whole * 0.25)


@on_every_implementation
@pytest.mark.parametrize("as_tensor", [False, True])
def test_micro_batches_with_num_items_sum_to_the_whole_batch(implementation, as_tensor):
    with implementation.active() as device, tiles_of(50):
        inputs = make_inputs((8, 5, 24), 120, torch.float32, device)
        x, weight, target = inputs.values()
        whole = ops.linear_cross_entropy(x, weight, target)
        num_items = (target != -100).sum()
        parts = [
            ops.linear_cross_entropy(
                x[rows], weight, target[rows], num_items=num_items if as_tensor else int(num_items)
            )
            for rows in (slice(0, 1), slice(1, 6), slice(6, 8))
        ]
        torch.testing.assert_close(sum(parts), whole)
        for accumulated, expected in zip(gradients(sum(parts), inputs), gradients(whole, inputs), strict=True):
            torch.testing.assert_close(accumulated, expected)


@pytest.mark.parametrize("num_items", [11, torch.tensor(11), torch.tensor([11]), torch.tensor([[11.0]])], ids=str)
def test_num_items_gives_a_scalar(num_items):
    inputs = make_inputs((9, 24), 70, torch.float32)
    loss = ops.linear_cross_entropy(**inputs, num_items=num_items)
    assert loss.dim() == 0
    torch.testing.assert_close(loss, ops.linear_cross_entropy(**inputs, reduction="sum") / 11)


@on_every_implementation
def test_non_contiguous_inputs(implementation):
    with implementation.active() as device, tiles_of(33):
        inputs = make_inputs((6, 10, 24), 70, torch.bfloat16, device)
        strided = {
            "x": inputs["x"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(),
            "weight": inputs["weight"].detach().t().contiguous().t().requires_grad_(),
            "target": inputs["target"].t().contiguous().t(),
        }
        check_op(ops.linear_cross_entropy, reference.linear_cross_entropy, strided)


@on_every_implementation
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_strided_labels(implementation, reduction):
    """In one dimension `reshape` makes no copy of them: every second label of more, and one label expanded."""
    with implementation.active() as device, tiles_of(33):
        inputs = make_inputs((10, 24), 70, torch.float32, device)
        labels = inputs["target"].repeat_interleave(2)[::2]
        assert not labels.is_contiguous()
        for target in (labels, torch.tensor(3, device=device).expand(10)):
            strided = inputs | {"target": target}
            check_op(ops.linear_cross_entropy, reference.linear_cross_entropy, strided, reduction=reduction)


@on_every_implementation
def test_row_operators_reject_strided_rows(implementation):
    with implementation.active() as device:
        logits, state = torch.zeros(6, 9, device=device), [torch.zeros(6, device=device) for _ in range(4)]
        target = torch.zeros(12, dtype=torch.int64, device=device)[::2]
        with pytest.raises(RuntimeError, match="target: expected 6 contiguous elements"):
            torch.ops.memkernels.cross_entropy_stats(logits, target, 0, 9, -100, 0.0, *state)
        wide = torch.zeros(6, 18, device=device)[:, ::2]
        with pytest.raises(RuntimeError, match="logits: expected"):
            torch.ops.memkernels.cross_entropy_grad_(wide, target.contiguous(), 0, 9, *state[:3], -100, 0.0, 0.0, 0.0)


@on_every_implementation
def test_no_tokens(implementation):
    with implementation.active() as device:
        inputs = make_inputs((0, 24), 70, torch.bfloat16, device, bias=True)
        loss = ops.linear_cross_entropy(**inputs, reduction="sum")
        assert loss == 0
        for gradient in gradients(loss, inputs):
            assert gradient.count_nonzero() == 0
        assert ops.linear_cross_entropy(**make_inputs((3, 0, 24), 70, torch.float32, device), shift=True).isnan()


@on_every_implementation
def test_all_ignored(implementation):
    with implementation.active() as device, tiles_of(33):
        inputs = make_inputs((9, 24), 70, torch.float32, device, bias=True, ignored=2.0)
        assert ops.linear_cross_entropy(**inputs).isnan()
        losses = ops.linear_cross_entropy(**inputs, reduction="none", z_loss=0.1, label_smoothing=0.1)
        assert losses.count_nonzero() == 0
        for gradient in torch.autograd.grad(losses, [inputs[name] for name in ("x", "weight", "bias")],
                                            torch.ones_like(losses)):  # fmt: skip
            assert gradient.count_nonzero() == 0


@on_every_implementation
def test_large_and_infinite_logits(implementation):
    with implementation.active() as device, tiles_of(3):
        bias = torch.tensor([-torch.inf, -torch.inf, -torch.inf, 3e4, -3e4, 200.0, 0.0], device=device)
        x, weight = torch.zeros(2, 4, device=device), torch.zeros(7, 4, device=device)
        inputs = {"x": x.requires_grad_(), "weight": weight, "bias": bias.requires_grad_()}
        target = torch.tensor([3, 5], device=device)
        losses = ops.linear_cross_entropy(**inputs, target=target, reduction="none")
        expected = F.cross_entropy(bias.repeat(2, 1), target, reduction="none")
        torch.testing.assert_close(losses, expected)
        (ours,), (theirs,) = (torch.autograd.grad(loss.sum(), bias) for loss in (losses, expected))
        torch.testing.assert_close(ours, theirs)


@on_every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"z_loss": 1e-4}, {"softcap": 900.0}], ids=str)
def test_losses_of_hundreds_as_torchs_cross_entropy(implementation, dtype, options):
    """Half of a row's logits are near 750, and the other half, the targets' among them, near 0: whole quarters, that
    float32 has exactly. torch's loss keeps a row's maximum and the logarithm of its sum apart."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-1, 2, (12, 32), generator=generator)
    weight = torch.randint(-2, 3, (200, 32), generator=generator) * 0.25
    x[:, 0], weight[:100, 0], weight[100:, 0] = 1, 750.0, 0.0
    target = torch.randint(100, 200, (12,), generator=generator)
    target[[3, 7]] = torch.tensor([-100, 5])

    def eager(x, weight, target, softcap=None, z_loss=0.0, **smoothing):
        logits = F.linear(x, weight)
        z = logits.to(torch.promote_types(logits.dtype, torch.float32))
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        losses = F.cross_entropy(z, target, reduction="none", **smoothing)
        return losses + z_loss * z.logsumexp(-1).square() * (target != -100)

    def ours(x, weight, target, **options):
        return ops.linear_cross_entropy(x, weight, target, reduction="none", **options)

    with implementation.active() as device, tiles_of(37):
        inputs = {"x": x.to(device, dtype).requires_grad_(), "weight": weight.to(device, dtype).requires_grad_()}
        check_op(ours, eager, {**inputs, "target": target.to(device)}, **options)


@on_every_implementation
def test_a_row_of_nothing_but_minus_infinity_has_a_finite_gradient(implementation):
    with implementation.active() as device:
        target, row_max = torch.zeros(1, dtype=torch.int64, device=device), torch.tensor([-torch.inf], device=device)
        logits, row_sum, grad_loss = row_max.repeat(1, 9), torch.zeros(1, device=device), torch.ones(1, device=device)
        torch.ops.memkernels.cross_entropy_grad_(logits, target, 0, 9, row_max, row_sum, grad_loss, -100, 0.0, 0.0, 0.1)
        assert logits.tolist() == [[-1.0] + [0.0] * 8]


@on_every_implementation
def test_probabilities_over_the_whole_range_of_float32(implementation):
    """The gradient with a maximum of 0 and a sum of 1 is exp(logit): within its own rounding, 0 below -87.34, infinite
    from 88.73."""
    with implementation.active() as device:
        inside = torch.linspace(-87.3, 88.7, 100_001)
        outside = torch.tensor([-torch.inf, -1e30, -87.34, 88.73, 1e30, torch.inf, torch.nan])
        logits = torch.cat([inside, outside]).to(device)[None]
        zero, one, target = torch.zeros(1, device=device), torch.ones(1, device=device), torch.tensor([10**6])
        arguments = (target.to(device), 0, 10**7, zero, one, one, -100, 0.0, 0.0, 0.0)
        torch.ops.memkernels.cross_entropy_grad_(logits, *arguments)
        actual, expected = logits[0, : len(inside)].cpu().double(), inside.double().exp()
        assert ((actual - expected).abs() / expected).max() <= torch.finfo(torch.float32).eps
        assert logits[0, len(inside) : -1].tolist() == [0.0, 0.0, 0.0, *[torch.inf] * 3] and logits[0, -1].isnan()


@on_every_implementation
def test_nan_logits_show_in_their_row_alone(implementation):
    with implementation.active() as device, tiles_of(3):
        x, weight, target = make_inputs((3, 4), 7, torch.float32, device, ignored=0).values()
        x = x.detach().clone()
        x[1, 2] = torch.nan
        assert ops.linear_cross_entropy(x, weight, target, reduction="none").isnan().tolist() == [False, True, False]


@on_every_implementation
def test_opcheck(implementation):
    with implementation.active() as device:
        x, weight, target, bias = (
            t.detach() for t in make_inputs((6, 10), 20, torch.bfloat16, device, bias=True).values()
        )
        memkernels = torch.ops.memkernels
        state = [torch.zeros(6, device=device) for _ in range(4)]
        logits = torch.randn(6, 9, device=device)
        torch.library.opcheck(memkernels.cross_entropy_stats.default, (logits, target, 3, 20, -100, 2.0, *state))
        row_stats, scalars = (state[0], torch.ones(6, device=device)), (-100, 2.0, 0.1, 0.01)
        gradient = (logits, target, 3, 20, *row_stats, state[1], *scalars)
        torch.library.opcheck(memkernels.cross_entropy_grad_.default, gradient)
        for added in (None, bias):
            head = ([weight, None, None, added, None, None], [], "", [], 1.0, 0.0)
            torch.library.opcheck(memkernels.linear_cross_entropy_fwd.default, (x, *head, target, *scalars))
            for wanted in ((True, True, False, False, added is not None, False), (False,) * 6):
                everything = (state[0], x, *head, target, *row_stats, *scalars, wanted)
                torch.library.opcheck(memkernels.linear_cross_entropy_bwd.default, everything)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_whole_and_equals_eager(dtype):
    def step(x, weight, target, bias):
        return ops.linear_cross_entropy(x, weight, target, bias=bias, shift=True, softcap=5.0) * 2

    check_compiled(step, make_inputs((3, 11, 24), 70, dtype, bias=True))


def test_gradcheck_without_a_kernel():
    inputs = make_inputs((2, 3, 5), 11, torch.float64, bias=True)
    names = ("x", "weight", "bias")
    with tiles_of(4):
        for reduction in ("mean", "none"):
            assert torch.autograd.gradcheck(
                lambda *tensors, reduction=reduction: ops.linear_cross_entropy(
                    **dict(zip(names, tensors, strict=True)),
                    target=inputs["target"],
                    reduction=reduction,
                    **ALL_OPTIONS,
                ),
                tuple(inputs[name] for name in names),
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference_without_a_kernel(dtype):
    with mock.patch.object(tiles, "has_kernel", lambda name, x: False), tiles_of(37):
        inputs = make_inputs((7, 9, 60), 131, dtype, bias=True)
        check_op(ops.linear_cross_entropy, reference.linear_cross_entropy, inputs, reduction="none", **ALL_OPTIONS)
        inputs = make_inputs((7, 9, 60), 131, dtype)
        check_op(ops.linear_cross_entropy, reference.linear_cross_entropy, inputs, shift=True)


def test_autocast_computes_as_linear_does():
    x, weight, target, bias = make_inputs((9, 24), 70, torch.float32, bias=True).values()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ops.linear_cross_entropy(x, weight, target, bias=bias)
    expected = ops.linear_cross_entropy(x.bfloat16(), weight.bfloat16(), target, bias=bias.bfloat16())
    assert torch.equal(loss, expected)
    for tensor, gradient, low in zip((x, weight, bias), torch.autograd.grad(loss, (x, weight, bias)),
                                     torch.autograd.grad(expected, (x, weight, bias)), strict=True):  # fmt: skip
        assert gradient.dtype == tensor.dtype and torch.equal(gradient, low)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ops.linear_cross_entropy(x.double(), weight.double(), target)
    assert torch.equal(loss, ops.linear_cross_entropy(x.double(), weight.double(), target))


def test_saves_its_inputs_and_two_numbers_a_token():
    x, weight, target = make_inputs((4, 16, 24), 500, torch.bfloat16).values()

    def saved(x, **options):
        return saved_bytes(lambda: ops.linear_cross_entropy(x, weight, target, **options), exclude=(x, weight, target))

    assert saved(x, reduction="sum") == 64 * 8
    assert saved(x) == 64 * 8 + 8  # the number of tokens
    assert saved(x, shift=True, reduction="sum") == 64 * (8 + 8)
    assert saved(x.detach().transpose(0, 1).contiguous().transpose(0, 1), reduction="sum") == 64 * 8


def test_autocast_saves_no_copy_of_the_weight():
    """x as autocast casts it, 2 bytes an element, and 8 bytes a token: torch keeps the cast weight."""
    x, weight, target = make_inputs((64, 24), 500, torch.float32).values()

    def saved(function):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return saved_bytes(function, exclude=(x, weight, target))

    assert saved(lambda: ops.linear_cross_entropy(x, weight, target, reduction="sum")) == 64 * (24 * 2 + 8)
    assert saved(lambda: F.linear(x, weight).sum()) == (64 + 500) * 24 * 2


ROWS, SIZE, VOCAB = 512, 64, 60_000


def peak_of_a_step():
    x, weight, target = make_inputs((ROWS, SIZE), VOCAB, torch.bfloat16).values()

    def step():
        ops.linear_cross_entropy(x, weight, target).backward()

    step()
    return peak_bytes(step)


def test_peak_memory_is_a_tile_not_the_logits():
    tile, dweight = tiles.TILE_BYTES["cpu"], VOCAB * SIZE * 2
    assert run_in_child(peak_of_a_step) < tile + dweight + 8 * 2**20 < ROWS * VOCAB * 2 * 0.6


def test_a_second_backward_gives_the_same_gradient():
    inputs = make_inputs((9, 24), 70, torch.bfloat16)
    loss = ops.linear_cross_entropy(**inputs)
    wanted = (inputs["x"], inputs["weight"])
    first, second = (torch.autograd.grad(loss, wanted, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_only_where_they_are_wanted():
    whole = make_inputs((9, 24), 70, torch.float32, bias=True)
    expected = dict(zip(("x", "weight", "bias"), gradients(ops.linear_cross_entropy(**whole), whole), strict=True))
    for name, gradient in expected.items():
        alone = {key: tensor if key in (name, "target") else tensor.detach() for key, tensor in whole.items()}
        with mock.patch.object(torch, "mm", wraps=torch.mm) as mm:
            (only,) = gradients(ops.linear_cross_entropy(**alone), alone)
        torch.testing.assert_close(only, gradient)
        # The logits have a bias, so they come from addmm, and dx is added up by addmm_: mm is dweight's alone.
        assert mm.call_count == (1 if name == "weight" else 0)


def test_a_label_out_of_range_is_an_error_before_anything_is_computed():
    x, weight, target = make_inputs((9, 24), 70, torch.float32, ignored=0).values()
    for label in (-1, 70, -101, 2**40):
        target[3] = label
        with (
            mock.patch.object(torch, "mm", side_effect=AssertionError),
            pytest.raises(
                IndexError, match=rf"target: expected values in \[0, 70\) or ignore_index=-100, got {label}\."
            ),
        ):
            ops.linear_cross_entropy(x, weight, target)
    ops.linear_cross_entropy(x, weight, target, ignore_index=2**40)


NESTED_TARGET = torch.nested.nested_tensor([torch.zeros(4, dtype=torch.int64)])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4, 8, dtype=torch.int32)}, TypeError, "x: expected float32"),
        ({"x": torch.tensor(1.0)}, ValueError, "x: expected at least one dimension"),
        ({"x": torch.zeros(4, 0)}, ValueError, r"x: expected shape \(..., d\), d > 0, got \(4, 0\)"),
        ({"x": torch.zeros(4, 7)}, ValueError, r"weight: expected shape \(V, 7\).*got \(10, 8\)"),
        ({"weight": torch.zeros(0, 8)}, ValueError, r"weight: expected shape \(V, 8\), V > 0, got \(0, 8\)"),
        ({"weight": torch.zeros(10, 8, dtype=torch.bfloat16)}, TypeError, "weight: expected torch.float32, as x"),
        ({"weight": torch.zeros(10, 8, device="meta")}, ValueError, "weight: expected device cpu"),
        ({"target": torch.zeros(4)}, TypeError, "target: expected an int64 tensor, got torch.float32"),
        ({"target": torch.zeros(4, 1, dtype=torch.int64)}, ValueError, r"target: expected shape \(4,\)"),
        ({"target": torch.zeros(4, dtype=torch.int64, device="meta")}, ValueError, "target: expected device cpu"),
        ({"target": torch.zeros(4, dtype=torch.int64).to_sparse()}, TypeError, "target: expected a dense tensor"),
        ({"target": NESTED_TARGET}, TypeError, "target: expected a dense tensor, got a nested one"),
        ({"num_items": NESTED_TARGET}, TypeError, "num_items: expected a dense tensor, got a nested one"),
        ({"bias": torch.zeros(8)}, ValueError, r"bias: expected shape \(10,\)"),
        ({"bias": torch.zeros(10, dtype=torch.float16)}, TypeError, "bias: expected torch.float32, as x"),
        ({"reduction": "avg"}, ValueError, "reduction: expected one of mean, sum, none, got 'avg'"),
        ({"reduction": "sum", "num_items": 3}, ValueError, "num_items: .*got it with 'sum'"),
        ({"num_items": 0}, ValueError, "num_items: expected a positive number, got 0"),
        ({"num_items": -2.5}, ValueError, "num_items: expected a positive number, got -2.5"),
        ({"num_items": float("nan")}, ValueError, "num_items: expected a positive number, got nan"),
        ({"num_items": "3"}, TypeError, "num_items: expected a positive number, got '3'"),
        ({"num_items": True}, TypeError, "num_items: expected a positive number, got True"),
        ({"num_items": torch.tensor([3, 4])}, ValueError, r"num_items: expected a tensor of one number, .* \(2,\)"),
        ({"num_items": torch.tensor(True)}, ValueError, "num_items: expected a tensor of one number, got torch.bool"),
        ({"num_items": torch.tensor(3, device="meta")}, ValueError, "num_items: expected device cpu"),
        ({"num_items": torch.tensor(0)}, ValueError, "num_items: expected a positive number, got 0"),
        ({"num_items": torch.tensor([float("nan")])}, ValueError, "num_items: expected a positive number, got nan"),
        ({"softcap": 0.0}, ValueError, "softcap: expected a positive number or None, got 0.0"),
        ({"softcap": float("inf")}, ValueError, "softcap: expected a positive number or None, got inf"),
        ({"softcap": "30"}, TypeError, "softcap: expected a positive number or None, got '30'"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing: expected a number in \[0, 1\], got 1.5"),
        ({"label_smoothing": None}, TypeError, r"label_smoothing: expected a number in \[0, 1\], got None"),
        ({"z_loss": -1e-4}, ValueError, "z_loss: expected a number from 0 up, got -0.0001"),
        ({"z_loss": float("nan")}, ValueError, "z_loss: expected a number from 0 up, got nan"),
        ({"z_loss": torch.tensor(0.1)}, TypeError, "z_loss: expected a number from 0 up, got tensor"),
        ({"ignore_index": -100.0}, TypeError, "ignore_index: expected an integer, got -100.0"),
        ({"ignore_index": None}, TypeError, "ignore_index: expected an integer, got None"),
        ({"ignore_index": 2**63}, ValueError, "ignore_index: expected an integer of 64 bits, got 9223372036854775808"),
        ({"x": torch.zeros(8), "target": torch.tensor(1), "shift": True}, ValueError, "shift: expected a target"),
        ({"shift": "x"}, TypeError, "shift: expected True or False, got 'x'"),
        ({"shift": torch.tensor([True, False])}, TypeError, "shift: expected True or False, got tensor"),
    ],
)
def test_bad_input_names_the_argument(change, error, message):
    arguments = {"x": torch.zeros(4, 8), "weight": torch.zeros(10, 8), "target": torch.zeros(4, dtype=torch.int64)}
    with mock.patch.object(tiles, "Head", side_effect=AssertionError), pytest.raises(error, match=message):
        ops.linear_cross_entropy(**(arguments | change))


def test_module_has_the_linear_layers_state_dict_and_the_ops_result():
    for bias in (False, True):
        ours, theirs = nn.LinearCrossEntropy(24, 70, bias, softcap=5.0), torch.nn.Linear(24, 70, bias)
        ours.load_state_dict(theirs.state_dict())
        x, _, target = make_inputs((9, 24), 70, torch.float32).values()
        expected = reference.linear_cross_entropy(x, theirs.weight, target, bias=theirs.bias, softcap=5.0)
        torch.testing.assert_close(ours(x, target), expected)
        torch.testing.assert_close(ours(x, target, num_items=3), expected * (target != -100).sum() / 3)
    with pytest.raises(TypeError, match="unknown options num_item"):
        nn.LinearCrossEntropy(24, 70, num_item=3)
    with pytest.raises(ValueError, match="reduction: expected one of mean, sum, none, got 'avg'"):
        nn.LinearCrossEntropy(24, 70, reduction="avg")
    with pytest.raises(TypeError, match="shift: expected True or False, got 1"):
        nn.LinearCrossEntropy(24, 70, shift=1)
