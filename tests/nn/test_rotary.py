"""nn.RotaryEmbedding: every variant against the model of transformers that defines it, and hand-computed values."""

import math

import pytest
import torch

from memkernels.nn import RotaryEmbedding
from memkernels.nn.rotary_scaling import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    YarnScaling,
)

transformers = pytest.importorskip("transformers")

CASES = {
    "default": ({"rope_type": "default"}, None),
    "linear": ({"rope_type": "linear", "factor": 4.0}, LinearScaling(4.0)),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, DynamicNTKScaling(2.0, 128)),
    "llama3": (
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 64},
        Llama3Scaling(8.0, 1.0, 4.0, 64),
    ),
    "yarn": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, YarnScaling(4.0, 64)),
    "yarn, exact ramp": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "truncate": False}
        | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 0.7},
        YarnScaling(4.0, 512, 16.0, 2.0, truncate=False, given_attention_factor=0.7),
    ),
    "longrope": (
        {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 64}
        | {"short_factor": [1.0 + i / 50 for i in range(16)], "long_factor": [2.0 + i for i in range(16)]},
        LongRopeScaling(tuple(1.0 + i / 50 for i in range(16)), tuple(2.0 + i for i in range(16)), 64, 4.0),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("length", [50, 128, 300])
def test_every_scaling_is_that_of_transformers(name, length):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters, scaling = CASES[name]
    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=2, max_position_embeddings=128,
        rope_parameters={"rope_theta": 500.0} | parameters,
    )  # fmt: skip
    positions = torch.arange(length)[None].repeat(2, 1)
    expected = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    actual = RotaryEmbedding(32, 500.0, scaling=scaling)(positions)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("interleaved", [False, True], ids=["Qwen2.5-VL", "Qwen3-VL"])
def test_three_axes_are_those_of_qwen(interleaved):
    if interleaved:
        from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig as Config
        from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding as Theirs
    else:
        from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig as Config
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding as Theirs
    sections = (6, 5, 5)
    config = Config(
        hidden_size=64, num_attention_heads=2, head_dim=32,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)},
    )  # fmt: skip
    positions = torch.randint(0, 100, (3, 2, 40), generator=torch.Generator().manual_seed(0))
    expected = Theirs(config)(torch.zeros(1), positions)
    actual = RotaryEmbedding(32, sections=sections, interleaved_sections=interleaved)(positions)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_a_fraction_of_the_head_turns():
    cos, sin = RotaryEmbedding(32, fraction=0.25)(torch.tensor([3]))
    angles = [3.0 / 10000 ** (2 * i / 8) for i in range(4)] * 2
    torch.testing.assert_close(cos[0], torch.tensor([math.cos(a) for a in angles]))
    torch.testing.assert_close(sin[0], torch.tensor([math.sin(a) for a in angles]))


def test_the_result_has_the_asked_dtype_and_the_state_dict_is_empty():
    rotary = RotaryEmbedding(16)
    assert rotary(torch.arange(4), torch.bfloat16)[0].dtype == torch.bfloat16
    assert not rotary.state_dict()


def test_a_model_in_bfloat16_turns_by_the_same_angles():
    positions = torch.tensor([[0, 5000], [70000, 131071]])
    rotary = RotaryEmbedding(64, 500000.0)
    expected = rotary(positions)
    for actual in (rotary.to(torch.bfloat16)(positions), rotary.double()(positions)):
        assert all(torch.equal(ours, before) for ours, before in zip(actual, expected, strict=True))


def test_a_dtype_that_is_not_floating_is_named():
    for dtype in (torch.int64, "bfloat16"):
        with pytest.raises(TypeError, match=rf"^dtype: expected float32, .*, got {dtype}"):
            RotaryEmbedding(16)(torch.arange(4), dtype)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"head_size": 0}, ValueError, "head_size: expected a positive integer, got 0"),
        ({"head_size": 16.0}, TypeError, "head_size: expected a positive integer, got 16.0"),
        ({"base": 0.0}, ValueError, "base: expected a positive number, got 0.0"),
        ({"base": math.nan}, ValueError, "base: expected a positive number, got nan"),
        ({"base": "1e4"}, TypeError, "base: expected a positive number, got '1e4'"),
        ({"fraction": 0.0}, ValueError, "fraction: expected"),
        ({"fraction": 1.5}, ValueError, "fraction: expected"),
        ({"fraction": 3 / 16}, ValueError, "fraction: expected"),
        ({"fraction": math.nan}, ValueError, "fraction: expected"),
        ({"scaling": "linear"}, TypeError, "scaling: expected one of nn.rotary_scaling or None, got 'linear'"),
        ({"scaling": LinearScaling}, TypeError, "scaling: expected one of nn.rotary_scaling or None, got <class"),
        ({"sections": 8}, TypeError, "sections: expected three numbers or None, got 8"),
        ({"sections": (4, 4, 4)}, ValueError, "sections: expected three numbers that sum to 8"),
        ({"sections": (9, -1, 0)}, ValueError, "sections: expected integers from 0 up, got -1"),
        ({"sections": (4, 2, 2), "interleaved_sections": 1}, TypeError, "interleaved_sections: expected True or False"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        RotaryEmbedding(**{"head_size": 16} | options)


def test_positions_without_three_axes_are_named():
    for positions in (torch.arange(4)[None], torch.tensor(4)):
        with pytest.raises(ValueError, match=r"positions: expected shape \(3, ..., S\)"):
            RotaryEmbedding(16, sections=(4, 2, 2))(positions)


@pytest.mark.parametrize("name", CASES)
def test_no_positions_have_no_angles(name):
    cos, sin = RotaryEmbedding(32, scaling=CASES[name][1])(torch.zeros(2, 0, dtype=torch.int64))
    assert cos.shape == sin.shape == (2, 0, 32)


@pytest.mark.parametrize(
    ("make", "change", "error", "message"),
    [
        (LinearScaling, {"factor": 0.0}, ValueError, "^factor: expected a positive number, got 0.0"),
        (LinearScaling, {"factor": "2"}, TypeError, "^factor: expected a positive number, got '2'"),
        (LinearScaling, {"attention_factor": -1}, ValueError, "^attention_factor: expected a positive number, got -1"),
        (DynamicNTKScaling, {"factor": math.inf}, ValueError, "^factor: expected a positive number, got inf"),
        (DynamicNTKScaling, {"original_length": 0}, ValueError, "^original_length: expected a positive integer, got 0"),
        (DynamicNTKScaling, {"original_length": 8.0}, TypeError, "^original_length: expected a positive integer"),
        (Llama3Scaling, {"factor": -8}, ValueError, "^factor: expected a positive number, got -8"),
        (Llama3Scaling, {"low_frequency_factor": -1}, ValueError, "^low_frequency_factor: expected a number from 0 up"),
        (Llama3Scaling, {"high_frequency_factor": 1.0}, ValueError, "^high_frequency_factor: .* above low.* 1.0"),
        (Llama3Scaling, {"high_frequency_factor": None}, TypeError, "^high_frequency_factor: .* above low.* 1.0"),
        (Llama3Scaling, {"original_length": -64}, ValueError, "^original_length: expected a positive integer"),
        (YarnScaling, {"factor": math.nan}, ValueError, "^factor: expected a positive number, got nan"),
        (YarnScaling, {"beta_slow": 0}, ValueError, "^beta_slow: expected a positive number, got 0"),
        (YarnScaling, {"beta_fast": 1.0}, ValueError, "^beta_fast: expected a number above beta_slow 1.0, got 1.0"),
        (YarnScaling, {"truncate": 1}, TypeError, "^truncate: expected True or False, got 1"),
        (YarnScaling, {"given_attention_factor": 0}, ValueError, "^given_attention_factor: expected a positive number"),
        (LongRopeScaling, {"short_factors": 2.0}, TypeError, "^short_factors: expected positive numbers, got 2.0"),
        (LongRopeScaling, {"long_factors": (1.0, 0.0)}, ValueError, "^long_factors: expected a positive number, got 0"),
        (LongRopeScaling, {"original_length": 1}, ValueError, "^original_length: expected an integer from 2 up, got 1"),
        (LongRopeScaling, {"factor": True}, TypeError, "^factor: expected a positive number, got True"),
    ],
)
def test_bad_scalings_are_named(make, change, error, message):
    arguments = {
        LinearScaling: {"factor": 2.0},
        DynamicNTKScaling: {"factor": 2.0, "original_length": 64},
        Llama3Scaling: {"factor": 8.0, "low_frequency_factor": 1.0}
        | {"high_frequency_factor": 4.0, "original_length": 64},
        YarnScaling: {"factor": 4.0, "original_length": 64},
        LongRopeScaling: {"short_factors": (1.0, 1.0), "long_factors": (2.0, 4.0)}
        | {"original_length": 64, "factor": 4.0},
    }[make]
    make(**arguments)
    with pytest.raises(error, match=message):
        make(**arguments | change)


def test_factors_are_as_many_as_frequencies():
    scaling = LongRopeScaling((1.0,) * 8, (2.0,), original_length=64, factor=4.0)
    with pytest.raises(ValueError, match=r"^long_factors: expected 8 numbers, one a frequency, got 1"):
        RotaryEmbedding(16, scaling=scaling)(torch.arange(4))


def test_sparse_positions_are_named():
    with pytest.raises(TypeError, match=r"^positions: expected a dense tensor, got one of layout"):
        RotaryEmbedding(16)(torch.arange(4).to_sparse())
