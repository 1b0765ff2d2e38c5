"""Plans: models and their repeated layers, the search, arguments, and the command."""

import json

import pytest
import torch

import memkernels
from memkernels.cli import main
from memkernels.planner import stack
from memkernels.planner.step import Job, trace_model, trace_step

CPU = torch.device("cpu")


def test_muon_takes_the_matrices_of_layers_and_adafactor_keeps_means(config):
    d, inner, layers, vocabulary = 64, 160, 6, 600
    shapes = [(d, d), (d, d), (d // 2, d), (d // 2, d), (inner, d), (inner, d), (d, inner)]
    vectors = (2 * layers + 1) * d
    muon, adafactor = (
        {bits: of.total for bits, of in sizes.states.items()}
        for name in ("muon", "adafactor")
        for sizes in (trace_model(Job(config, 64, torch.float32, None, None, CPU, name), (32, 8)),)
    )
    of_layers = layers * sum(rows * columns for rows, columns in shapes)
    assert muon[32] == 4 * of_layers + 8 * (2 * vocabulary * d + vectors)
    assert muon[8] < 0.3 * muon[32]
    means = layers * sum(map(sum, shapes)) + 2 * (vocabulary + d)
    assert adafactor == {32: 4 * (means + vectors), 8: 4 * (means + vectors)}


@pytest.mark.parametrize("recompute", [None, "none", "sublayer", "layer"])
def test_three_layers_stand_for_any_number(config, monkeypatch, recompute):
    job = Job(config, 64, torch.float32, None, None, CPU)
    short = trace_step(job, 2, recompute, False)
    monkeypatch.setattr(stack, "_ENOUGH", 99)
    assert trace_step(job, 2, recompute, False) == short


def test_recomputing_more_keeps_less_and_computes_more(config):
    estimates = [
        memkernels.plan(config, memory="1GB", seq=128, batch=2, recompute=recompute, offload="none", state_bits=32,
                        step_in_backward=False, micro_batch=2).estimates[0]
        for recompute in ("none", "sublayer", "layer")
    ]  # fmt: skip
    kept = [estimate.parts["activations"] for estimate in estimates]
    extra = [estimate.extra_flops for estimate in estimates]
    assert kept == sorted(kept, reverse=True) and extra == sorted(extra) and extra[0] == 0
    tokens, d, layers = 256, 64, 6
    assert kept[1] - kept[2] == layers * tokens * d * 2  # 3 d and 2 d a token and layer, in bfloat16


def test_the_cheapest_that_fits_comes_first_and_none_is_lost(config):
    found = memkernels.plan(config, memory="10MB", seq=128, batch=2, dtype="float32", offload="none")
    fitting = [estimate.peak <= found.memory for estimate in found.estimates]
    assert any(fitting) and not all(fitting) and fitting == sorted(fitting, reverse=True)
    assert len({estimate.technique for estimate in found.estimates}) == len(found.estimates)
    assert found.best is found.estimates[0]
    small = memkernels.plan(config, memory=1000, seq=128, recompute="layer", offload="none")
    assert small.best is None and "none fits" in str(small)
    peaks = [estimate.peak for estimate in small.estimates]
    assert peaks == sorted(peaks)


def test_nothing_of_a_plan_is_left_behind(config):
    memkernels.plan(config, memory="1GB", seq=64, lora=4, base="nf4", recompute="layer", offload="disk")
    parameter = torch.nn.Parameter(torch.ones(512))
    optimizer = memkernels.optim.AdamW([parameter], state_bits=8)
    parameter.sum().backward()
    optimizer.step()
    assert type(parameter.data) is torch.Tensor and float(parameter.detach().max()) < 1
    assert float(memkernels.quant.quantize_nf4(torch.ones(64, 64)).dequantize().mean()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"memory": "much"}, "memory: expected a number of bytes"),
        ({"seq": 0}, "seq: expected a positive integer"),
        ({"batch": 2.5}, "batch: expected a positive integer"),
        ({"base": "nf4"}, "base: 'nf4' is what adapters are put on"),
        ({"lora": 4, "base": "int3"}, "base: expected one of"),
        ({"lora": 0}, "lora: expected a positive integer"),
        ({"recompute": "all"}, "recompute: expected one of none, sublayer, layer, transformers"),
        ({"offload": "tape"}, "offload: expected one of none, disk"),
        ({"offload": "host", "device": "cpu"}, "offload: expected one of none, disk, got 'host'"),
        ({"offload_states": "tape"}, "offload_states: expected one of none, disk"),
        ({"offload_gradients": "tape"}, "offload_gradients: expected one of none, disk"),
        ({"offload_gradients": "disk", "stage": 1, "ranks": 2}, "offload_gradients: expected stage 0 or 2"),
        ({"offload_gradients": "disk", "step_in_backward": True}, "offload_gradients: expected stage 0 or 2"),
        ({"stage": 4}, "stage: expected one of 0, 1, 2, 3"),
        ({"stage": True}, "stage: expected one of 0, 1, 2, 3, got True"),
        ({"dtype": ["float32"]}, "dtype: expected one of bfloat16, float32"),
        ({"step_in_backward": 2}, "step_in_backward: expected True or False, got 2"),
        ({"state_bits": 8.0}, "state_bits: expected one of 32, 16, 8, 4, got 8.0"),
        ({"state_bits": 5}, "state_bits: expected one of 32, 16, 8, 4"),
        ({"micro_batch": 3, "batch": 2}, "micro_batch: expected a number of rows from 1 to batch=2"),
        ({"optimizer": "sophia"}, "optimizer: expected one of adamw, lion, sgd, adafactor, muon"),
        ({"dtype": "float64"}, "dtype: expected one of bfloat16, float32"),
        ({"reduce_dtype": "float16"}, "reduce_dtype: expected one of bfloat16, float32"),
        ({"device": "tpu"}, "device: expected cpu, or cuda"),
        ({"step_in_backward": True, "stage": 1, "ranks": 2}, "step_in_backward: it steps once a backward"),
    ],
)
def test_bad_arguments_are_named(config, options, error):
    with pytest.raises((TypeError, ValueError), match=error):
        memkernels.plan(config, **({"memory": "1GB", "seq": 64, "recompute": "layer", "offload": "none"} | options))


def test_a_model_that_is_none_is_refused(config, tmp_path, monkeypatch):
    import transformers

    with pytest.raises(TypeError, match="model: expected a name, a path or a configuration, got int"):
        memkernels.plan(3, memory="1GB", seq=64)
    with pytest.raises(ValueError, match="no causal language model of ViTConfig"):
        memkernels.plan(transformers.ViTConfig(), memory="1GB", seq=64)
    for written, error in (
        ('{"model_type": "llama", "num_attention_heads": 0}', "configuration of it: ZeroDivisionError"),
        ('{"model_type": "llama", "hidden_size": "64"}', "configuration of it: .* Field 'hidden_size' expected int"),
        ('{"model_type": "nowhere"}', "configuration of it: .* model type `nowhere`"),
        ("null", "configuration of it: TypeError"),
        ('{"model_type": "llama", "hidden_act": "nowhere"}', "model of its configuration: KeyError: 'nowhere'"),
    ):
        (tmp_path / "config.json").write_text(written)
        with pytest.raises(ValueError, match=f"model: transformers makes no {error}.*$"):
            memkernels.plan(tmp_path, memory="1GB", seq=64)
    for path in (str(tmp_path / "nowhere"), tmp_path / "nowhere", "./nowhere", "nowhere/config.json"):
        with pytest.raises(FileNotFoundError, match=f"model: {path} does not exist"):  # the hub is not asked
            memkernels.plan(path, memory="1GB", seq=64)


def test_a_model_whose_forward_fails_is_named(caplog):
    transformers = pytest.importorskip("transformers")
    model = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        num_experts=2, num_experts_per_tok=4, moe_intermediate_size=16,
    )  # fmt: skip
    with pytest.raises(ValueError, match="model: its forward fails: RuntimeError: k not in range"):
        memkernels.plan(model, memory="1GB", seq=16, recompute="none", offload="none", state_bits=32)
    assert not caplog.records


def test_of_a_vision_language_model_what_rows_of_text_train(config):
    """Beside a Llama's the weights of a tower, which has the longer stack."""
    transformers = pytest.importorskip("transformers")
    vision = {"depth": 9, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "num_heads": 2}
    text = {key: getattr(config, key) for key in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings",
    )}  # fmt: skip
    axes = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
    both = transformers.Qwen2_5_VLConfig(text_config=text | axes, vision_config=vision)
    one = {"memory": "1GB", "seq": 64, "recompute": "layer", "offload": "none", "state_bits": 32}
    one |= {"step_in_backward": False, "offload_states": "none", "offload_gradients": "none", "dtype": "float32"}
    alone, seeing = (memkernels.plan(of, **one).estimates[0].parts for of in (transformers.Qwen2Config(**text), both))
    assert seeing["gradients"] == alone["gradients"] and seeing["states"] == alone["states"]
    tower = transformers.AutoModelForImageTextToText.from_config(both).model.visual
    weights = sum(parameter.nbytes for parameter in tower.parameters())
    assert seeing["parameters"] - alone["parameters"] == pytest.approx(weights, abs=200)  # frequencies of rotations


def test_a_tower_whose_first_values_are_drawn_within_bounds():
    """transformers draws them anew until each is, which tensors without memory do not tell."""
    transformers = pytest.importorskip("transformers")
    text = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
    text["num_key_value_heads"] = 1
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    model = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    one = {"memory": "1GB", "recompute": "layer", "offload": "none", "state_bits": 32, "step_in_backward": False}
    assert memkernels.plan(model, seq=16, offload_states="none", offload_gradients="none", **one).best


def test_a_row_has_no_more_tokens_than_a_model_has_learned_positions_for(config):
    transformers = pytest.importorskip("transformers")
    one = {"memory": "1GB", "recompute": "none", "offload": "none", "state_bits": 32, "step_in_backward": False}
    one |= {"offload_states": "none", "offload_gradients": "none"}
    model = transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2)
    assert memkernels.plan(model, seq=16, **one).best
    with pytest.raises(ValueError, match="seq: expected at most 16, the positions that the model has, got 17"):
        memkernels.plan(model, seq=17, **one)
    assert memkernels.plan(config, seq=2 * config.max_position_embeddings, **one).best  # computed ones go on


def test_the_command_prints_a_table_and_draws_it(config, tmp_path, capsys):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    path, picture = tmp_path / "config.json", tmp_path / "plots" / "plan.png"
    path.write_text(json.dumps(config.to_dict() | {"architectures": ["LlamaForCausalLM"]}))
    command = ["plan", "--model", str(path), "--memory", "100MB", "--seq", "64", "--offload", "none", "--lora", "4"]
    assert main([*command, "--output", str(picture)]) == 0
    printed = capsys.readouterr().out
    for expected in ("recompute", "activations", "sublayer", "adapters of rank 4", str(picture)):
        assert expected in printed
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000
    assert main([*command, "--memory", "1KB", "--recompute", "layer", "--output", str(picture)]) == 1
    capsys.readouterr()
    assert main([*command, "--base", "nf4", "--stage", "2", "--model", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("plan: ")
