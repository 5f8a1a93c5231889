import csv
from itertools import product

import architectures
import pytest
import tiny
import torch
from pydantic import ValidationError
from test_prune import fit
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from compress.errors import UserError
from compress.maths.rounding import Scheme, fit_grid, round_to_grid
from compress.maths.sparsity import squared_norms
from compress.models.calibration import observe
from compress.models.matrices import find_zeros, matrices, measure_matrices
from compress.running.promises import check_bits
from compress.techniques.mixed import Choice, Mixed, choose_bits, measure_choices
from compress.techniques.prune import Prune

SMALL = {"group_size": 16, "samples": 8, "measured": 8}


KEY = "technique.mixed"


def choice(name, bits, size, divergence):
    return Choice((name,), bits, size, divergence)


def test_a_budget_worked_by_hand():
    options = [
        [choice("a", 2, 20, 9.0), choice("a", 4, 40, 1.0)],
        [choice("b", 2, 20, 2.0), choice("b", 4, 40, 1.9)],
    ]
    assert [choice.bits for choice in choose_bits(options, 60, KEY)] == [4, 2]  # 3.0 in all; [2, 4] has 10.9
    assert [choice.bits for choice in choose_bits(options, 80, KEY)] == [4, 4]
    assert [choice.bits for choice in choose_bits(options, 40, KEY)] == [2, 2]


def test_no_choice_within_the_budget_diverges_less():
    torch.manual_seed(0)
    options = [[choice(str(i), b, 10.0 * b, float(d)) for b, d in zip((2, 3, 4), torch.rand(3))] for i in range(5)]
    chosen = choose_bits(options, 150, KEY)
    allowed = [choices for choices in product(*options) if sum(choice.stored_bits for choice in choices) <= 150]
    least = min(sum(choice.divergence for choice in choices) for choices in allowed)
    assert sum(choice.divergence for choice in chosen) == least


@pytest.mark.parametrize(
    ("name", "lm"), [("bert", False), ("llama", True), ("gemma2", True), ("t5", False), ("mixtral", True)]
)
@torch.no_grad()
def test_a_choice_diverges_as_the_whole_model_does_with_these_layers_rounded(name, lm):
    model, batches, scheme = (
        architectures.build(name, lm),
        [architectures.inputs(seed) for seed in (1, 2)],
        Scheme(2, 16),
    )
    before = {key: value.clone() for key, value in model.state_dict().items()}
    each = list(measure_choices(model, batches, matrices(model), [scheme]))
    assert sorted(layer for (choice,) in each for layer in choice.layers) == sorted(matrices(model))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    answers = [model(**batch).logits for batch in batches]
    moments = {key: shared.statistic for shared in observe(model, batches, squared_norms) for key in shared.matrices}
    for (choice,) in each[:: max(1, len(each) // 6)]:
        kept = {layer: matrices(model)[layer].weight.clone() for layer in choice.layers}
        for layer, weight in kept.items():
            grid = fit_grid(weight, scheme, weight.dtype, moments[layer])
            matrices(model)[layer].weight.copy_(round_to_grid(weight, grid, scheme))
        moved = []
        for batch, answer in zip(batches, answers):
            log_p, log_q = answer.double().log_softmax(-1), model(**batch).logits.double().log_softmax(-1)
            divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
            moved.append((divergence[batch["attention_mask"].bool()] if lm else divergence).mean())
        for layer, weight in kept.items():
            matrices(model)[layer].weight.copy_(weight)
        # The texts of experts run one by one, so that the mean is over texts and not over tokens.
        assert choice.divergence == pytest.approx(
            torch.stack(moved).mean().item(), rel=0.3 if name == "mixtral" else 1e-4
        )


@pytest.mark.parametrize("build", tiny.ALL)
def test_the_average_is_within_the_budget_and_zeros_stay(build, tmp_path):
    model = build()
    fit(model, Prune(sparsity=0.3))
    masks = find_zeros(model)
    stage = Mixed(average_bits=5.5, **SMALL)  # two of these are for scales: 32 bits for 16 weights
    fit(model, stage)
    assert all((model.get_submodule(name).weight[mask] == 0).all() for name, mask in masks.items())
    layers = matrices(model)
    weights = {name: layer.weight.numel() for name, layer in layers.items()}
    average = sum(stage.average_bits[name] * weights[name] for name in weights) / sum(weights.values())
    assert 5.2 < average <= 5.5
    assert len({choice.bits for choice in stage.chosen}) > 1
    for choice in stage.chosen:  # layers that share an input have one choice
        kinds = {name.rpartition(".")[2] for name in choice.layers}
        assert (
            kinds in ({"query", "key", "value"}, {"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
            or len(kinds) == 1
        )
    batch = {k: v for k, v in tiny.batch(seed=9).items() if k != "labels"}
    with torch.no_grad():
        expected = model.eval()(**batch).logits
    sizes = measure_matrices(model)
    stage.save(model, tmp_path)
    check_bits("mixed", stage.average_bits, sizes, tmp_path)
    auto = AutoModelForCausalLM if build is tiny.llama_lm else AutoModelForSequenceClassification
    with torch.no_grad():
        assert torch.allclose(auto.from_pretrained(tmp_path)(**batch).logits, expected, atol=1e-6)


def test_layers_that_matter_get_the_bits():
    model = tiny.bert()
    unimportant = model.bert.encoder.layer[1].output.dense
    unimportant.weight.data *= 1e-3  # negligible in the sum with the residual
    stage = Mixed(average_bits=5.5, **SMALL)
    fit(model, stage)
    bits = {name: quantized.scheme.bits for name, quantized in stage.quantized.items()}
    assert bits["bert.encoder.layer.1.output.dense"] < bits["bert.encoder.layer.0.output.dense"]


def test_the_report_holds_every_layer_and_what_each_choice_costs(tmp_path):
    model = tiny.bert()
    stage = Mixed(average_bits=5.5, **SMALL)
    fit(model, stage)
    stage.report(tmp_path)
    rows = list(csv.DictReader((tmp_path / "bits.csv").open()))
    assert [row["layer"] for row in rows] == [name for choice in stage.chosen for name in choice.layers]
    assert {row["layer"]: int(row["bits"]) for row in rows} == {n: q.scheme.bits for n, q in stage.quantized.items()}
    for row in rows:
        costs = [float(row[f"divergence_at_{bits}"]) for bits in (2, 3, 4, 8)]
        assert costs[0] > costs[2] > costs[3] >= 0
    errors = {row["layer"]: row for row in csv.DictReader((tmp_path / "errors.csv").open())}
    assert errors.keys() == stage.quantized.keys()
    for row in rows:
        assert errors[row["layer"]]["bits"] == row["bits"] and float(errors[row["layer"]]["gain"]) >= 0


def test_a_budget_out_of_reach_is_refused():
    with pytest.raises(UserError, match=r"average_bits is 3.5; with its scale a weight takes 4.000 bits at 2"):
        Mixed(average_bits=3.5, **SMALL).check(tiny.bert(), [])
    with pytest.raises(UserError, match=r"and 10.000 at 8. Set a number between"):
        Mixed(average_bits=11, **SMALL).check(tiny.bert(), [])
    with pytest.raises(UserError, match="measured is 64 and technique.mixed.samples 8"):
        Mixed(samples=8, measured=64)
    with pytest.raises(UserError, match="group_size is 48, which does not divide"):
        Mixed(group_size=48).check(tiny.bert(), [])


@pytest.mark.parametrize("wrong", [{"choices": (4,)}, {"choices": (4, 5)}, {"average_bits": 0}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        Mixed(**wrong)
