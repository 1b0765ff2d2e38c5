"""ops.linear_cross_entropy over quantised and adapted weights: against the float64 reference, by tiles in memory."""

from unittest import mock

import pytest
import torch

from memkernels import nn, ops, quant
from memkernels.ops.linear_cross_entropy import head_gradients, reference, tiles
from memkernels.testing import check_op, peak_bytes, random_tensor, run_in_child, saved_bytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QUANTIZE = {"nf4": quant.quantize_nf4, "int8": quant.quantize_int8, "dense": lambda weight: weight}
ALL_OPTIONS = {"softcap": 3.0, "label_smoothing": 0.1, "z_loss": 1e-2, "reduction": "none"}
SIZE, VOCAB, RANK = 60, 131, 3  # a row of W is no whole number of NF4's blocks


@pytest.fixture(autouse=True)
def several_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "tile_columns", lambda x, size, vocab_size: min(37, vocab_size))


def labels(*shape, vocab_size=VOCAB):
    generator = torch.Generator().manual_seed(3)
    target = torch.randint(0, vocab_size, shape, generator=generator)
    target[torch.rand(shape, generator=generator) < 0.25] = -100
    return target


def make_inputs(kind, dtype, *, adapter=None, magnitude=False, bias=True, shape=(3, 9)):
    """x, weight and target; an adapter, of the dtype `adapter`."""
    weight = random_tensor(VOCAB, SIZE, dtype=dtype, seed=1, scale=SIZE**-0.5)
    inputs = {"x": random_tensor(*shape, SIZE, dtype=dtype), "weight": weight, "target": labels(*shape)}
    if kind != "dense":
        inputs["weight"] = QUANTIZE[kind](weight.detach())
    if adapter is not None:
        inputs["lora_a"] = random_tensor(RANK, SIZE, dtype=adapter, seed=2, scale=SIZE**-0.5)
        inputs["lora_b"] = random_tensor(VOCAB, RANK, dtype=adapter, seed=4, scale=RANK**-0.5)
    if magnitude:
        inputs["magnitude"] = random_tensor(VOCAB, dtype=dtype, seed=5)
    if bias:
        inputs["bias"] = random_tensor(VOCAB, dtype=dtype, seed=6)
    return inputs


def over_flat(function, dropout_p=0.0):
    def call(x, weight, target, lora_a=None, lora_b=None, magnitude=None, **options):
        if lora_a is not None:
            weight = ops.LoRAWeight(weight, lora_a, lora_b, 0.7, dropout_p, 7, magnitude)
        return function(x, weight, target, **options)

    return call


def check(inputs, dropout_p=0.0, **options):
    check_op(
        over_flat(ops.linear_cross_entropy, dropout_p), over_flat(reference.linear_cross_entropy, dropout_p), inputs,
        roundings=2, **options,
    )  # fmt: skip


def gradients(loss, inputs):
    wanted = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    return dict(zip(wanted, torch.autograd.grad(loss, tuple(wanted.values())), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised(kind, dtype):
    check(make_inputs(kind, dtype), **ALL_OPTIONS)
    check(make_inputs(kind, dtype, bias=False), shift=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", QUANTIZE)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("magnitude", [False, True], ids=["lora", "dora"])
def test_adapted(kind, dtype, dropout_p, magnitude):
    check(make_inputs(kind, dtype, adapter=dtype, magnitude=magnitude), dropout_p, **ALL_OPTIONS)


@pytest.mark.parametrize("magnitude", [False, True], ids=["lora", "dora"])
def test_adapted_without_a_bias(magnitude):
    inputs = make_inputs("nf4", torch.float16, adapter=torch.float16, magnitude=magnitude, bias=False)
    check(inputs, 0.3, shift=True)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_a_float32_adapter_of_bfloat16(kind, dropout_p):
    check(make_inputs(kind, torch.bfloat16, adapter=torch.float32), dropout_p, num_items=7)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_float64_is_exact(kind):
    inputs = make_inputs(kind, torch.float64 if kind == "dense" else torch.float32, magnitude=True)
    if kind == "nf4":
        inputs = {name: tensor.detach().to(torch.float64) if tensor.is_floating_point() else tensor
                  for name, tensor in inputs.items()}  # fmt: skip
        inputs["x"].requires_grad_()
    for name, shape in (("lora_a", (RANK, SIZE)), ("lora_b", (VOCAB, RANK))):
        inputs[name] = random_tensor(*shape, dtype=torch.float64, seed=9, scale=0.1)
    ours, exact = (
        over_flat(function, 0.3)(**inputs, softcap=3.0)
        for function in (ops.linear_cross_entropy, reference.linear_cross_entropy)
    )
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(ours, inputs), gradients(exact, inputs), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("trained", ["x", "lora_a", "lora_b", "magnitude", "bias", "weight"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("magnitude", [False, True], ids=["lora", "dora"])
def test_gradients_only_where_they_are_wanted(trained, dropout_p, magnitude):
    inputs = make_inputs("dense", torch.float32, adapter=torch.float32, magnitude=True)
    if not magnitude:
        del inputs["magnitude"]
    if trained not in inputs:
        return
    function = over_flat(ops.linear_cross_entropy, dropout_p)
    expected = gradients(function(**inputs), inputs)[trained]
    alone = {name: tensor if name == trained else tensor.detach() for name, tensor in inputs.items()}
    alone[trained].requires_grad_()
    with mock.patch.object(head_gradients, "mm", wraps=torch.mm) as mm:
        (only,) = gradients(function(**alone), alone).values()
    torch.testing.assert_close(only, expected)
    # dx in float32 is added up by addmm_: mm is dweight's.
    assert mm.call_count == (-(-VOCAB // 37) if trained == "weight" else 0)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_no_tokens(kind):
    inputs = make_inputs(kind, torch.bfloat16, adapter=torch.float32, shape=(0,))
    loss = over_flat(ops.linear_cross_entropy, 0.3)(**inputs, reduction="sum")
    assert loss == 0
    for gradient in gradients(loss, inputs).values():
        assert gradient.count_nonzero() == 0


def test_opcheck():
    inputs = make_inputs("nf4", torch.bfloat16, adapter=torch.bfloat16, magnitude=True)
    x, weight, target, a, b, _, bias = (tensor.detach() for tensor in inputs.values())
    scale, seed = torch.rand(VOCAB), torch.tensor(7)
    stored = (list(weight.parts), weight.encoding.kind, weight.encoding.sizes)
    head = ([None, a, b, bias, scale, seed], *stored, 0.7, 0.3)
    options, losses = (-100, 2.0, 0.1, 0.01), torch.rand(target.shape)
    torch.library.opcheck(torch.ops.memkernels.linear_cross_entropy_fwd.default, (x, *head, target, *options))
    backward = torch.ops.memkernels.linear_cross_entropy_bwd.default
    for wanted in ((True, False, True, True, True, True), (False, False, False, True, False, False)):
        torch.library.opcheck(backward, (losses, x, *head, target, *losses.flatten().expand(2, -1), *options, wanted))


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_compiles_whole_and_equals_eager(kind):
    """Up to the code generator, which has nothing to do: forward and backward are an operator each."""
    function = over_flat(ops.linear_cross_entropy, 0.3)
    results = []
    for of in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        inputs = make_inputs(kind, torch.bfloat16, adapter=torch.float32)
        loss = of(**inputs, shift=True, softcap=5.0)
        results.append({"loss": loss} | gradients(loss, inputs))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_autocast_computes_as_the_blocks_do(kind):
    inputs = make_inputs(kind, torch.float32, adapter=torch.float32)
    function = over_flat(ops.linear_cross_entropy, 0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = function(**inputs)
    low = {name: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    expected = function(**low)
    assert torch.equal(loss, expected)
    for ours, theirs in zip(gradients(loss, inputs).values(), gradients(expected, inputs).values(), strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs)


def test_saves_its_inputs_two_numbers_a_token_and_a_seed():
    inputs = make_inputs("nf4", torch.bfloat16, adapter=torch.float32, shape=(64,))
    weight = inputs["weight"]
    exclude = (*weight.parts, *(tensor for tensor in inputs.values() if tensor is not weight))
    function = over_flat(ops.linear_cross_entropy, 0.3)
    assert saved_bytes(lambda: function(**inputs, reduction="sum"), exclude=exclude) == 64 * 8 + 8


ROWS, WIDE, MANY = 64, 512, 32_768


def peak_of_a_step():
    x = random_tensor(ROWS, WIDE, dtype=torch.float32)
    a = random_tensor(8, WIDE, dtype=torch.float32)
    b = torch.zeros(MANY, 8, requires_grad=True)
    stored = quant.quantize_nf4(torch.randn(MANY, WIDE))
    target = labels(ROWS, vocab_size=MANY)

    def step():
        ops.linear_cross_entropy(x, ops.LoRAWeight(stored, a, b, 0.7, 0.1), target).backward()

    step()
    return peak_bytes(step)


def test_peak_memory_is_a_tile_not_the_dequantised_weight():
    tile, gradient = tiles.TILE_BYTES["cpu"], MANY * 8 * 4
    assert run_in_child(peak_of_a_step) < tile + gradient + 8 * 2**20 < MANY * WIDE * 4 * 0.5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4, 7)}, ValueError, r"weight: expected shape \(V, 7\), V > 0, got \(10, 8\)"),
        ({"x": torch.zeros(4, 8, dtype=torch.bfloat16)}, TypeError, "weight: expected torch.bfloat16, as x"),
        ({"a": torch.zeros(2, 8, dtype=torch.float16)}, TypeError, "lora_a of weight: expected torch.float32"),
        ({"target": torch.tensor([0, 10, 0, 0])}, IndexError, r"target: expected values in \[0, 10\)"),
    ],
)
@pytest.mark.parametrize("kind", ["dense", "int8"])
def test_bad_input_names_the_argument(kind, change, error, message):
    arguments = {"x": torch.zeros(4, 8), "target": torch.zeros(4, dtype=torch.int64), "a": torch.zeros(2, 8)} | change
    a = arguments["a"]
    weight = ops.LoRAWeight(QUANTIZE[kind](torch.zeros(10, 8)), a, torch.zeros(10, 2, dtype=a.dtype))
    with pytest.raises(error, match=message):
        ops.linear_cross_entropy(arguments["x"], weight, arguments["target"])


def test_a_quantised_weight_has_no_gradient():
    weight = quant.quantize_int8(torch.zeros(10, 8)).requires_grad_()
    with pytest.raises(ValueError, match="weight: a quantised weight has no gradient"):
        ops.linear_cross_entropy(torch.zeros(4, 8), weight, torch.zeros(4, dtype=torch.int64))


def test_module_with_a_quantised_weight_and_an_adapter():
    inputs = make_inputs("nf4", torch.float32, adapter=torch.float32, bias=False)
    x, weight, target, a, b = inputs.values()
    head = nn.LinearCrossEntropy(SIZE, VOCAB, softcap=5.0)
    head.weight = torch.nn.Parameter(weight, requires_grad=False)
    torch.testing.assert_close(head(x, target), reference.linear_cross_entropy(x, weight, target, softcap=5.0))
    adapted = ops.LoRAWeight(head.weight, a, b, 0.7)
    expected = reference.linear_cross_entropy(x, adapted, target, softcap=5.0)
    torch.testing.assert_close(ops.linear_cross_entropy(x, adapted, target, softcap=5.0), expected)
