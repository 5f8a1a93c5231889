import csv
import json

import architectures
import pytest
import tiny
import torch
from pydantic import ValidationError
from test_prune import fit
from transformers import AutoModelForCausalLM

from compress.errors import UserError
from compress.maths.rounding import Scheme, minmax_grid, round_to_grid
from compress.models.calibration import split_sections
from compress.models.layers import limit_gradients
from compress.models.matrices import find_zeros, matrices, measure_matrices
from compress.running.promises import capture_state, check_bits, check_model
from compress.runtimes.torch import load
from compress.techniques.autoround import AutoRound, Descent, Objective, learn_section
from compress.techniques.gptq import GPTQ
from compress.techniques.prune import Prune


def autoround(**settings):
    return AutoRound(**{"group_size": 16, "samples": 16, "batch_size": 4, "iterations": 30, **settings})


def one(**settings):
    return {key: value for key, value in tiny.batch(**settings).items() if key != "labels"}


@torch.no_grad()
def logits(model):
    return model.eval()(**one(seed=9)).logits


def nearest(model, scheme):
    for matrix in matrices(model).values():
        weight = matrix.weight.clone()
        matrix.weight.copy_(round_to_grid(weight, minmax_grid(weight, scheme, torch.float32), scheme))
    return model


@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (3, False), (4, True)])
def test_its_answers_are_closer_than_those_of_rounding_to_nearest(bits, symmetric):
    expected, model, stage = logits(tiny.llama_lm()), tiny.llama_lm(), autoround(bits=bits, symmetric=symmetric)
    fit(model, stage)
    rounded = logits(nearest(tiny.llama_lm(), stage.scheme))
    assert (logits(model) - expected).square().mean() < 0.6 * (rounded - expected).square().mean()
    assert all(outcome.loss < 0.6 * outcome.nearest for outcome in stage.outcomes)


def test_it_beats_gptq_on_the_outputs_of_blocks():
    def measure(stage):
        model = tiny.llama_lm()
        fit(model, stage)
        return (logits(model) - logits(tiny.llama_lm())).square().mean()

    assert measure(autoround(bits=3, iterations=40)) < measure(GPTQ(bits=3, group_size=16, samples=16))


@pytest.mark.parametrize("inputs", ["quantized", "float"])
def test_the_target_is_the_output_of_the_unchanged_model(inputs):
    model, batches = tiny.llama_lm(), [one(seed=seed) for seed in range(2)]
    hidden = model(**batches[0], output_hidden_states=True).hidden_states
    with limit_gradients(model):
        for place, section in enumerate(split_sections(model, batches, matrices(model), floats=True)):
            objective = Objective(section, inputs == "float")
            kept = batches[0]["attention_mask"].bool()
            if place == 0:
                assert torch.allclose(objective.targets[0], hidden[1][kept], atol=1e-6)
            # The block before is quantized by now: the second is exact on the inputs of the unchanged model alone.
            assert (objective.loss(0) < 1e-12) == (place == 0 or inputs == "float")
            learn_section(section, Scheme(2, 16), Descent(2, 0.5, True), inputs == "float")


@pytest.mark.parametrize("step", [10.0, None])
def test_no_block_is_worse_than_rounded_to_nearest_even_if_descent_fails(step, tmp_path):
    stage = autoround(bits=4, iterations=2, step=step)
    fit(tiny.llama_lm(), stage)
    stage.report(tmp_path)
    with (tmp_path / "losses.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["block"] for row in rows] == ["model.layers.0", "model.layers.1"]
    assert all(0 < float(row["squared_error"]) <= float(row["squared_error_of_nearest"]) for row in rows)


@pytest.mark.parametrize(
    ("build", "bits", "symmetric", "group_size"),
    [(tiny.bert, 4, True, -1), (tiny.llama, 3, False, 16), (tiny.llama_lm, 6, False, -1), (tiny.roberta, 8, True, 16)],
)
def test_it_keeps_head_and_zeros_and_reloads_to_the_same_logits(build, bits, symmetric, group_size, tmp_path):
    model = build()
    fit(model, Prune(sparsity=0.4))
    before, masks, sizes = capture_state(model), find_zeros(model), measure_matrices(model)
    stage = autoround(bits=bits, symmetric=symmetric, group_size=group_size, iterations=4)
    fit(model, stage)
    check_model("autoround", stage, before, model)
    assert masks and all((model.get_submodule(name).weight[mask] == 0).all() for name, mask in masks.items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    expected = logits(model)
    stage.save(model, tmp_path)
    assert torch.allclose(logits(load(tmp_path, "lm" if build is tiny.llama_lm else "multiclass")), expected, atol=1e-6)
    described = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert described["config_groups"]["group_0"]["weights"]["num_bits"] == bits
    check_bits("autoround", stage.average_bits, sizes, tmp_path)


def test_plain_transformers_loads_it(tmp_path):
    model, stage = tiny.llama_lm().bfloat16(), autoround(iterations=2)
    model.model.rotary_emb = tiny.llama_lm().model.rotary_emb  # computes in float32; bfloat16() changed it too
    fit(model, stage)
    expected = logits(model)
    stage.save(model, tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")), expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_format_of_gptq_stores_it_too(symmetric, tmp_path):
    model = architectures.build("llama", lm=True)
    stage = AutoRound(format="gptq", group_size=32, symmetric=symmetric, samples=4, iterations=2)
    tiny.trainer(stage).fit(tiny.Theirs(model), architectures.loader(1, lm=True))
    expected = model(**architectures.inputs()).logits
    stage.save(model, tmp_path)
    assert torch.allclose(load(tmp_path, "lm")(**architectures.inputs()).logits, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["albert", "t5", "gpt2", "mixtral"])
def test_models_whose_blocks_cannot_run_alone_or_hold_other_layers_are_quantized(name):
    lm = architectures.ARCHITECTURES[name].decoder
    model, stage = architectures.build(name, lm=lm), autoround(bits=3, iterations=8)
    tiny.trainer(stage).fit(tiny.Theirs(model), architectures.loader(1))
    assert set(stage.quantized) == set(matrices(model))
    assert all(outcome.loss < outcome.nearest for outcome in stage.outcomes)
    assert (
        [outcome.name for outcome in stage.outcomes] == [""] if name in ("albert", "t5") else len(stage.outcomes) == 3
    )


def test_what_a_pattern_names_stays_and_the_head_is_quantized_if_asked():
    model, before = tiny.llama_lm(), tiny.llama_lm()
    stage = autoround(iterations=2, skip=("embeddings", "*.q_proj"))
    fit(model, stage)
    assert "lm_head" in stage.quantized and stage.outcomes[-1].name == ""
    for name, matrix in matrices(model).items():
        assert torch.equal(matrix.weight, before.get_submodule(name).weight) == name.endswith("q_proj")


def test_after_training_it_quantizes_what_was_trained():
    model, untrained = tiny.llama(), tiny.llama()
    fit(untrained, autoround(iterations=2))
    fit(model, autoround(iterations=2), epochs=1)
    name, layer = next(iter(matrices(model).items()))
    assert not torch.equal(layer.weight, untrained.get_submodule(name).weight)
    for row in layer.weight.view(32, 2, 16).flatten(0, 1):
        assert len(row.unique()) <= 16


@pytest.mark.parametrize("wrong", [{"bits": 9}, {"iterations": 0}, {"step": 0}, {"inputs": "both"}, {"group_size": -2}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        AutoRound(**wrong)


def test_settings_that_do_not_fit_are_refused_from_the_shapes_alone():
    with torch.device("meta"):
        skeleton = tiny.llama()
    with pytest.raises(UserError, match=r"technique.autoround.group_size is 48, which does not divide the 32 inputs"):
        autoround(group_size=48).check(skeleton, [])
    with pytest.raises(UserError, match=r"technique.autoround.format is gptq, whose readers know language models only"):
        autoround(format="gptq").check(skeleton, [])
    with pytest.raises(UserError, match=r"technique.autoround.bits is 5; readers of .* know 2, 3, 4 and 8. Set"):
        AutoRound(bits=5, format="gptq")
