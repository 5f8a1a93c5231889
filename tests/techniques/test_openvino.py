import json

import pytest
import tiny
import torch
from pydantic import ValidationError
from test_onnx import every_shape, tied, told_apart, uneven

from compress.errors import UserError
from compress.exchange import Agreement, agreement
from compress.models import linears, prunable
from compress.runtimes.openvino import load
from compress.techniques.finetune import FineTune
from compress.techniques.openvino import OpenVINO
from compress.techniques.prune import Prune


def export(model, folder, *before, lm=False, **settings):
    """The stage, and what it saved as it loads again."""
    stage = OpenVINO(**{"samples": 8, "group_size": 8, **settings})
    for one in (*before, stage):
        tiny.trainer(one).fit(FineTune(model), tiny.loader(batches=2, lm=lm), tiny.loader(batches=2, lm=lm))
    stage.save(model, folder)
    return stage, load(folder, "")


def integers(exported):
    return [p for p in exported.parameters() if p.dtype == torch.int8]


@pytest.mark.parametrize(
    "build", [tiny.bert, tiny.roberta, tiny.llama_lm, tied, lambda: uneven(tiny.bert()), lambda: uneven(tiny.llama())]
)
def test_the_graph_answers_as_the_model_for_batches_of_any_shape(build, tmp_path):
    model = told_apart(build())
    stage, exported = export(model, tmp_path, lm=build in (tiny.llama_lm, tied))
    found = agreement(model.eval(), exported, every_shape())
    assert found.max_logit_difference < 1e-5 * found.largest_logit and found.label_agreement == 1
    assert exported.compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"
    assert stage.exported is None  # so that the chain compares the artifact with the model itself
    assert sum(p.numel() for p in exported.parameters()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("build", "precision", "share"),
    [
        (tiny.bert, "fp16", 0.01),
        (tiny.bert, "bf16", 0.1),
        (tiny.bert, "int8", 0.1),
        (tiny.bert, "int8_weights", 0.1),
        (tiny.llama_lm, "int8", 0.5),
        (tiny.llama_lm, "int4_weights", 0.5),
    ],
)
def test_a_lower_precision_stays_near_and_keeps_head_and_embeddings_and_reloads_exactly(
    build, precision, share, tmp_path
):
    model = told_apart(build())
    stage, exported = export(model, tmp_path, precision=precision, lm=build is tiny.llama_lm)
    found = agreement(model.eval(), exported, every_shape())
    assert 0 < found.max_logit_difference < share * found.largest_logit
    for batch in every_shape():
        batch.pop("labels")
        assert torch.equal(stage.exported(**batch).logits, exported(**batch).logits)
    wanted = sum(layer.weight.numel() for _, layer in linears(model)) if precision.startswith("int") else 0
    assert sum(p.numel() for p in integers(exported)) == wanted
    assert sum(p.numel() for p in exported.parameters()) == sum(p.numel() for p in model.parameters())
    if wanted:
        assert any(torch.equal(p, model.get_input_embeddings().weight) for p in exported.parameters())


def test_head_and_embeddings_are_quantized_if_asked(tmp_path):
    model = told_apart(tiny.bert())
    _, exported = export(model, tmp_path, precision="int8_weights", skip=())
    layers = prunable(model, embeddings=True, head=True).values()
    assert sum(p.numel() for p in integers(exported)) == sum(layer.weight.numel() for layer in layers)


def test_what_a_pattern_names_stays_in_floats_and_zeros_stay_zeros(tmp_path):
    model = told_apart(tiny.bert())
    skip = ("embeddings", "head", "*output.dense")
    _, exported = export(model, tmp_path, Prune(sparsity=0.5), precision="int8_weights", skip=skip)
    left = sum(layer.weight.numel() for name, layer in linears(model) if not name.endswith("output.dense"))
    found = torch.cat([p.flatten() for p in integers(exported)])
    assert len(found) == left and sum(int((p == 0).sum()) for p in exported.parameters()) >= 0.5 * 2 * 8192


def test_the_angles_of_positions_keep_their_digits_in_float16(tmp_path):
    model = tiny.llama()
    _, exported = export(model, tmp_path, precision="fp16")
    constants = [node for node in exported.graph.get_ops() if node.get_type_name() == "Constant"]
    kept = [node.data.flatten().tolist() for node in constants if node.get_element_type().to_string() == "f32"]
    assert model.model.rotary_emb.inv_freq.tolist() in kept


def test_the_model_is_left_as_it_was_and_the_report_says_how_far_the_answers_are(tmp_path):
    model = tiny.bert()
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stage, _ = export(model, tmp_path, precision="bf16", hint="throughput")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()) and model.training
    stage.report(tmp_path)
    told = Agreement(**json.loads((tmp_path / "agreement.json").read_text()))
    assert told.examples == 8 and told.max_logit_difference > 0 and told.label_agreement > 0.5
    settings = json.loads((tmp_path / "compile.json").read_text())
    assert settings == {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": "bf16"}


@pytest.mark.parametrize("wrong", [{"precision": "nf4"}, {"samples": 0}, {"group_size": -2}, {"hint": "speed"}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        OpenVINO(**wrong)


def test_what_does_not_fit_the_model_is_told_from_the_shapes_alone():
    with torch.device("meta"):
        skeleton = tiny.bert()
    with pytest.raises(UserError, match=r"technique.openvino.skip: `\*qery` fits none"):
        OpenVINO(skip=("head", "*qery")).check(skeleton, [])
    with pytest.raises(UserError, match=r"technique.openvino.group_size=48 does not divide the 32 inputs"):
        OpenVINO(precision="int4_weights", group_size=48).check(skeleton, [])
    OpenVINO(precision="int8", group_size=48).check(skeleton, [])
