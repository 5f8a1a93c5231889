import csv
import json

import pytest
import tiny
import torch
from pydantic import ValidationError
from test_prune import fit
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from compress.errors import PostconditionError, UserError
from compress.maths.gptq import gptq
from compress.maths.rounding import Scheme, minmax_grid, round_to_grid, round_to_nearest
from compress.models.matrices import find_zeros, matrices, measure_matrices
from compress.running.promises import check_bits
from compress.runtimes.torch import load
from compress.techniques.gptq import GPTQ, write_better
from compress.techniques.prune import Prune


def problem(rows=24, columns=64, tokens=400):
    torch.manual_seed(0)
    inputs = torch.randn(tokens, columns) @ torch.randn(columns, columns)  # correlated like activations
    return torch.randn(rows, columns), inputs


def quantize(weight, hessian, scheme, **settings):
    """Return the quantized weight of one layer as floats, and its grid."""
    (found,) = gptq([weight], hessian, [scheme], **settings)
    return found.dequantize(weight.dtype), found.grid


def error(weight, quantized, inputs):
    return ((weight - quantized) @ inputs.T).pow(2).mean().item()


def test_two_columns_worked_by_hand():
    # Equal inputs: the second column can compensate the rounding error of the first.
    weight = torch.tensor([[1.0, -0.6, 0.3]])
    inputs = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    quantized, _ = quantize(weight, inputs.T @ inputs, Scheme(3), damping=1e-6)
    scale = 2 / 7  # the widest weight reaches the end of seven steps
    assert quantized[0, 0].item() == pytest.approx(3 * scale)  # 1 / scale = 3.5, and 3 is the last integer
    assert quantized[0, 1].item() == pytest.approx(-2 * scale)  # nearest to -0.6; loses 0.02857
    assert quantized[0, 2].item() == pytest.approx(scale)  # nearest to 0.3 - 0.02857
    alone = round_to_grid(weight, minmax_grid(weight, Scheme(3), torch.float32), Scheme(3))
    assert error(weight, quantized, inputs) <= error(weight, alone, inputs)


def test_an_error_moves_to_a_column_that_can_take_it():
    weight = torch.tensor([[0.4, 0.4, 1.0]])
    inputs = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])  # the first two columns see one input
    quantized, _ = quantize(weight, inputs.T @ inputs, Scheme(3), damping=1e-6)
    scale = 2 / 7
    # 0.4 is nearest to one step, 0.286. The lost 0.114 moves to the second column, where 0.514 is nearest to two steps.
    assert quantized[0, :2].tolist() == pytest.approx([scale, 2 * scale])


@pytest.mark.parametrize("group_size", [-1, 16, 64])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [True, False])
def test_it_beats_rounding_to_nearest(bits, group_size, symmetric, act_order):
    weight, inputs = problem()
    scheme = Scheme(bits, group_size, symmetric)
    quantized, _ = quantize(weight, inputs.T @ inputs, scheme, act_order=act_order)
    nearest = round_to_grid(weight, minmax_grid(weight, scheme, torch.float32), scheme)
    assert error(weight, quantized, inputs) < 0.8 * error(weight, nearest, inputs)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_value_is_on_the_grid(symmetric, act_order):
    weight, inputs = problem()
    quantized, grid = quantize(weight, inputs.T @ inputs, Scheme(4, 16, symmetric), act_order=act_order)
    scale, zero = (part.repeat_interleave(16, 1) for part in grid)
    integers = quantized / scale + zero
    assert torch.allclose(integers, integers.round(), atol=1e-4)
    assert integers.min() >= -8.001 and integers.max() <= 7.001


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 16])
def test_zeros_stay_zero_and_are_made_up_for(group_size, symmetric, act_order):
    weight, inputs = problem()
    scheme = Scheme(4, group_size, symmetric)
    hessian = inputs.T @ inputs
    pruned = weight * (weight.abs() > 0.7)
    quantized, _ = quantize(pruned, hessian, scheme, act_order=act_order)
    assert (quantized[pruned == 0] == 0).all()
    # The control: quantize without a mask and set the zeros again afterwards.
    unmasked, _ = quantize(pruned + (pruned == 0) * 1e-12, hessian, scheme, act_order=act_order)
    assert error(pruned, quantized, inputs) < error(pruned, unmasked * (pruned != 0), inputs)


def test_dead_inputs_are_rounded_and_not_pruned():
    weight, inputs = problem()
    inputs[:, 5] = 0
    quantized, _ = quantize(weight, inputs.T @ inputs, Scheme())
    assert quantized.isfinite().all() and (quantized[:, 5] != 0).any()


@pytest.mark.parametrize(
    ("build", "symmetric", "group_size"), zip(tiny.ALL, (True, False, False, True), (-1, 16, -1, 16))
)
def test_it_keeps_head_and_zeros_and_reloads_to_the_same_logits_without_us(build, symmetric, group_size, tmp_path):
    model = build()
    causal = build is tiny.llama_lm
    head = next(m for m in reversed(list(model.modules())) if isinstance(m, torch.nn.Linear)).weight.clone()
    fit(model, Prune(sparsity=0.4))
    masks = find_zeros(model)
    stage = GPTQ(bits=4, group_size=group_size, symmetric=symmetric, samples=8)
    fit(model, stage)
    assert all((model.get_submodule(name).weight[mask] == 0).all() for name, mask in masks.items())
    one = {k: v for k, v in tiny.batch(seed=9).items() if k != "labels"}
    with torch.no_grad():
        expected = model.eval()(**one).logits
    stage.save(model, tmp_path)
    auto = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    reloaded = auto.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.allclose(reloaded(**one).logits, expected, atol=1e-6)
    assert torch.equal(next(m for m in reversed(list(reloaded.modules())) if type(m) is torch.nn.Linear).weight, head)
    described = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert described["config_groups"]["group_0"]["weights"]["num_bits"] == 4


@pytest.mark.parametrize("bits, group_size, symmetric", [(3, 16, False), (4, 16, True), (2, -1, True), (8, 8, False)])
def test_as_many_bits_are_stored_as_asked(bits, group_size, symmetric, tmp_path):
    model = tiny.bert()
    stage = GPTQ(bits=bits, group_size=group_size, symmetric=symmetric, samples=8)
    fit(model, stage)
    sizes = measure_matrices(model)
    stage.save(model, tmp_path)
    check_bits("gptq", stage.average_bits, sizes, tmp_path)
    promised = stage.average_bits["bert.encoder.layer.0.attention.self.query"]  # 32 inputs, scales of 32 bits
    beside = 32 + (0 if symmetric else bits)
    assert promised == bits + beside / (32 if group_size == -1 else group_size)
    with pytest.raises(PostconditionError, match=r"should store 2\.000 bits a weight and stored"):
        check_bits("gptq", dict.fromkeys(stage.average_bits, 2.0), sizes, tmp_path)


@pytest.mark.parametrize("build", [tiny.bert, tiny.llama])
def test_what_a_pattern_names_stays_and_the_head_is_quantized_if_asked(build, tmp_path):
    model = build()
    names = list(matrices(model))
    before = {name: model.get_submodule(name).weight.clone() for name in names}
    stage = GPTQ(group_size=16, samples=8, skip=("embeddings", f"{names[0]}"))
    fit(model, stage)
    outside = {"bert.pooler.dense", "classifier"} if build is tiny.bert else {"score"}
    assert set(stage.quantized) == {*names[1:], *outside}
    assert torch.equal(model.get_submodule(names[0]).weight, before[names[0]])
    one = {k: v for k, v in tiny.batch(seed=9).items() if k != "labels"}
    with torch.no_grad():
        expected = model.eval()(**one).logits
    stage.save(model, tmp_path)
    with torch.no_grad():
        assert torch.allclose(
            AutoModelForSequenceClassification.from_pretrained(tmp_path)(**one).logits, expected, atol=1e-6
        )


def test_embeddings_are_refused():
    with pytest.raises(UserError, match=r"skip is \['head'\]; embeddings stay floats here. Add"):
        GPTQ(skip=("head",)).check(tiny.bert(), [])


@pytest.mark.parametrize("bits", [4, 8])
def test_bfloat16_weights_reload_exactly(bits, tmp_path):
    model = tiny.llama().bfloat16()
    stage = GPTQ(bits=bits, group_size=16, samples=8)
    fit(model, stage)
    one = {k: v for k, v in tiny.batch().items() if k != "labels"}
    with torch.no_grad():
        expected = model.eval()(**one).logits
    quantized = {name: weight.clone() for name, weight in model.named_parameters()}
    stage.save(model, tmp_path)
    weights = dict(load(tmp_path, "multiclass").named_parameters())
    assert all(torch.equal(weights[name], weight) for name, weight in quantized.items())
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype="auto")
    with torch.no_grad():  # sums in another order, which the processor decides, round to the number beside
        assert torch.allclose(reloaded(**one).logits, expected, rtol=0, atol=2**-7 * expected.abs().max().item())


def test_a_group_that_does_not_divide_a_width_is_reported_from_the_shapes_alone():
    with torch.device("meta"):
        skeleton = tiny.bert()
    with pytest.raises(
        UserError, match=r"group_size is 48, which does not divide the 32 inputs of `bert.encoder.layer.0"
    ):
        GPTQ(group_size=48).check(skeleton, [])
    GPTQ(group_size=-1).check(skeleton, [])


@pytest.mark.parametrize("wrong", [{"bits": 5}, {"damping": 0}, {"samples": 0}, {"group_size": -2}, {"bits": "four"}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        GPTQ(**wrong)
    with pytest.raises(UserError, match="group_size is 0, which does not divide"):
        GPTQ(group_size=0).check(tiny.bert(), [])


def test_after_training_it_quantizes_what_was_trained():
    model, untrained = tiny.bert(), tiny.bert()
    fit(untrained, GPTQ(group_size=16, samples=8))
    fit(model, GPTQ(group_size=16, samples=8), epochs=1)
    name, layer = next(iter(matrices(model).items()))
    assert not torch.equal(layer.weight, untrained.get_submodule(name).weight)
    for row in layer.weight.view(32, 2, 16).flatten(0, 1):
        assert len(row.unique()) <= 16


def test_no_layer_is_worse_than_rounded_to_nearest_and_the_report_says_by_how_much(tmp_path):
    stage = GPTQ(bits=3, group_size=16, samples=16)
    fit(tiny.llama_lm(), stage)
    stage.report(tmp_path)
    with (tmp_path / "errors.csv").open(newline="") as file:
        rows = {row["layer"]: row for row in csv.DictReader(file)}
    assert set(rows) == set(matrices(tiny.llama_lm()))
    assert all(float(row["squared_error"]) <= float(row["squared_error_of_nearest"]) for row in rows.values())
    assert sum(float(row["gain"]) for row in rows.values()) / len(rows) > 0.1
    assert all(row["bits"] == "3" for row in rows.values())


def test_the_better_of_two_roundings_is_kept():
    weight, moment = torch.tensor([[1.0, 0.5]]), torch.eye(2)
    grid = minmax_grid(weight, Scheme(4), torch.float32)
    nearest = round_to_nearest(weight, grid, Scheme(4))
    worse = nearest._replace(integers=nearest.integers - 1)
    for ours in (nearest, worse):
        outcome = write_better(weight, ours, moment)
        assert torch.equal(outcome.quantized.weight.integers, nearest.integers)
        assert outcome.error == pytest.approx(outcome.nearest)
