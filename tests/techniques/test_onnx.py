import json
from importlib.metadata import version

import pytest
import tiny
import torch
from pydantic import ValidationError
from transformers import LlamaConfig, LlamaForCausalLM

from compress import shapes
from compress.errors import UserError
from compress.exchange import Agreement, agreement
from compress.models import linears, prunable
from compress.runtimes.onnxruntime import load
from compress.techniques import onnx as exporting
from compress.techniques.finetune import FineTune
from compress.techniques.gptq import GPTQ
from compress.techniques.onnx import Onnx
from compress.techniques.prune import Prune

PRECISIONS = ("fp32", "fp16", "int8_dynamic", "int8_static")


def told_apart(model):
    """The model with weights large enough, and biases different enough, for a mistake in any of them to show."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
        elif ".layer" in name:
            parameter.data *= 6
    return model


def uneven(model):
    """With blocks cut to shapes of their own."""
    shapes.shape(model, [2, 4] if model.config.model_type == "llama" else [3, 1], [40, 24])
    shapes.record(model)
    return model


def tied():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**tiny.SHAPE, num_key_value_heads=2, pad_token_id=0, tie_word_embeddings=True))


def export(model, folder, *before, **settings):
    """The stage, and what it saved as it loads again."""
    stage = Onnx(**{"samples": 8, **settings})
    lm = model.config.architectures is None and isinstance(model, LlamaForCausalLM)
    for one in (*before, stage):
        tiny.trainer(one).fit(FineTune(model), tiny.loader(lm=lm), tiny.loader(lm=lm))
    stage.save(model, folder)
    return stage, load(folder, "")


def every_shape():
    """Batches unlike the one that was traced, as long as the models have positions."""
    return [tiny.batch(rows, length, seed=7) for rows, length in ((1, 3), (2, 38), (5, 10))]


def in_onnx(folder):
    import onnx

    return onnx.load(folder / "model.onnx").graph


@pytest.mark.parametrize("build", [*tiny.ALL, tied, lambda: uneven(tiny.bert()), lambda: uneven(tiny.llama())])
def test_the_graph_answers_as_the_model_for_batches_of_any_shape(build, tmp_path):
    model = told_apart(build())
    stage, exported = export(model, tmp_path)
    found = agreement(model.eval(), exported, every_shape())
    assert found.max_logit_difference < 1e-5 * found.largest_logit and found.label_agreement == 1
    assert stage.exported is None  # so that the chain compares the artifact with the model itself
    assert sum(p.numel() for p in exported.parameters()) == sum(p.numel() for p in model.parameters())


def test_token_types_are_an_input_where_the_texts_have_them(tmp_path):
    model = told_apart(tiny.bert())
    types = {"token_type_ids": torch.arange(10).expand(4, 10) % 2}
    stage = Onnx()
    tiny.trainer(stage).fit(FineTune(model), [{**tiny.batch(), **types}])
    stage.save(model, tmp_path)
    found = agreement(model.eval(), load(tmp_path, ""), [{**tiny.batch(seed=3), **types}])
    assert found.max_logit_difference < 1e-5 * found.largest_logit
    assert stage.agreement is None  # there was no validation text


@pytest.mark.parametrize("build", [*tiny.ALL, lambda: uneven(tiny.bert())])
@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_a_lower_precision_stays_near_and_reloads_exactly(build, precision, tmp_path):
    model = told_apart(build())
    stage, exported = export(model, tmp_path, precision=precision)
    found = agreement(model.eval(), exported, every_shape())
    assert 0 < found.max_logit_difference < 0.2 * found.largest_logit
    for batch in every_shape():
        batch.pop("labels")
        assert torch.equal(stage.exported(**batch).logits, exported(**batch).logits)


@pytest.mark.parametrize("precision", PRECISIONS[2:])
def test_int8_quantizes_the_blocks_and_leaves_head_and_embeddings(precision, tmp_path):
    model = told_apart(tiny.bert())
    _, exported = export(model, tmp_path, precision=precision)
    integers = [p for p in exported.parameters() if p.dtype == torch.int8]
    assert sum(p.numel() for p in integers) == sum(layer.weight.numel() for _, layer in linears(model))
    floats = [p for p in exported.parameters() if p.dtype == torch.float32]
    for name in ("classifier", "bert.pooler.dense", "bert.embeddings.word_embeddings"):
        weight = model.get_submodule(name).weight
        assert any(torch.equal(p, one) for p in floats for one in (weight, weight.T))


@pytest.mark.parametrize("precision", PRECISIONS[2:])
@pytest.mark.parametrize("build", [tiny.bert, tiny.llama_lm, tied])
def test_head_and_embeddings_are_quantized_if_asked(build, precision, tmp_path):
    model = told_apart(build())
    _, exported = export(model, tmp_path, precision=precision, skip=())
    integers = sum(p.numel() for p in exported.parameters() if not p.is_floating_point())
    head = 60 * 32 if build is tied else 0  # by another scale than that of the embeddings, and so not the same
    assert integers == head + sum(layer.weight.numel() for layer in prunable(model, True, True).values())
    assert any(len(p) == 60 and not p[0].any() for p in exported.parameters())  # the embedding of padding
    found = agreement(model.eval(), exported, every_shape())
    assert found.max_logit_difference < 0.2 * found.largest_logit


@pytest.mark.parametrize(("pattern", "left"), [("*output.dense", 32 * 32 + 32 * 64), ("*query", 3 * 32 * 32)])
def test_what_a_pattern_names_stays_in_floats(pattern, left, tmp_path):
    model = told_apart(tiny.bert())
    skip = ("embeddings", "head", pattern)
    _, exported = export(model, tmp_path, precision="int8_dynamic", skip=skip)
    integers = sum(p.numel() for p in exported.parameters() if p.dtype == torch.int8)
    assert integers == sum(layer.weight.numel() for _, layer in linears(model)) - 2 * left


def test_a_static_scale_is_that_of_the_calibration_text(tmp_path):
    from onnx import numpy_helper

    model, stage = told_apart(tiny.bert()), Onnx(precision="int8_static", samples=4)
    batches = [tiny.batch(padded=False, seed=seed) for seed in range(2)]
    tiny.trainer(stage).fit(FineTune(model), batches)
    stage.save(model, tmp_path)
    with torch.no_grad():
        first, both = (model.eval().bert.embeddings(torch.cat([b["input_ids"] for b in batches[:i]])) for i in (1, 2))
    kept = in_onnx(tmp_path).initializer
    scales = [numpy_helper.to_array(one).item() for one in kept if one.name.endswith("output_0_scale")]
    assert (first.max() - first.min()).item() / 255 in [pytest.approx(scale) for scale in scales]
    assert (both.max() - both.min()).item() / 255 not in [pytest.approx(scale) for scale in scales]


def test_zeros_stay_zeros(tmp_path):
    model = told_apart(tiny.bert())
    _, exported = export(model, tmp_path, Prune(sparsity=0.5), precision="int8_dynamic")
    integers = torch.cat([p.flatten() for p in exported.parameters() if p.dtype == torch.int8])
    assert (integers == 0).float().mean() >= 0.5


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_packed_artifact_is_exported(symmetric, tmp_path):
    from compress.runtimes.torch import load as load_torch

    model = told_apart(tiny.bert())
    before = GPTQ(group_size=16, symmetric=symmetric, samples=8)
    tiny.trainer(before).fit(FineTune(model), tiny.loader())
    (tmp_path / "packed").mkdir()
    before.save(model, tmp_path / "packed")
    packed = load_torch(tmp_path / "packed", "multiclass")
    stage, exported = export(packed, tmp_path)
    found = agreement(packed.eval(), exported, every_shape())
    assert found.max_logit_difference < 1e-5 * found.largest_logit
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_a_bfloat16_model_is_exported_in_float32(tmp_path):
    model = told_apart(tiny.llama()).bfloat16()
    _, exported = export(model, tmp_path)
    assert {p.dtype for p in exported.parameters()} == {torch.float32}
    found = agreement(model.eval(), exported, every_shape())
    assert found.max_logit_difference < 1e-5 * found.largest_logit


def test_attention_is_fused_by_the_heads_that_each_block_has_left(tmp_path):
    export(uneven(tiny.bert()), tmp_path)
    nodes = [node for node in in_onnx(tmp_path).node if node.op_type == "Attention"]
    heads = [next(one.i for one in node.attribute if one.name == "num_heads") for node in nodes]
    if not nodes and version("onnxruntime") < "1.31":
        pytest.skip("this ONNX Runtime does not know the masks of transformers 5")
    assert heads == [3, 1]


def test_weights_that_two_layers_share_are_stored_once(tmp_path):
    for name, model in (("tied", tied()), ("untied", tiny.llama_lm())):
        (tmp_path / name).mkdir()
        export(told_apart(model), tmp_path / name)
    sizes = [(tmp_path / name / "model.onnx").stat().st_size for name in ("tied", "untied")]
    assert sizes[1] - sizes[0] > 0.9 * 4 * 60 * 32


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_tensors_of_a_large_model_lie_beside_it(precision, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "LARGEST", 1000)
    model = told_apart(tiny.bert())
    _, exported = export(model, tmp_path, precision=precision)
    stored = sum(p.numel() * p.element_size() for p in exported.parameters())
    assert 0.8 * stored < (tmp_path / "model.onnx.data").stat().st_size < 1.2 * stored + 4 * 4096  # pages that align it
    found = agreement(model.eval(), exported, every_shape())
    assert found.max_logit_difference < 0.2 * found.largest_logit
    assert sum(p.numel() for p in exported.parameters()) == sum(p.numel() for p in model.parameters())


def test_the_model_is_left_as_it_was(tmp_path):
    model = tiny.bert()
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    implementation = model.config._attn_implementation
    export(model, tmp_path, precision="int8_static")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training and model.config._attn_implementation == implementation


def test_the_report_says_how_far_the_answers_are(tmp_path):
    stage, _ = export(told_apart(tiny.bert()), tmp_path, precision="int8_dynamic")
    stage.report(tmp_path)
    told = Agreement(**json.loads((tmp_path / "agreement.json").read_text()))
    assert told.examples == 16 and told.max_logit_difference > 0 and told.label_agreement > 0.5


def test_disagreement_of_every_kind_of_head():
    def answers(*rows):
        return lambda **_: type("Output", (), {"logits": torch.tensor(rows)})

    def compare(ours, theirs, **config):
        model = answers(*theirs)
        model.config = type("Config", (), config)
        return agreement(model, answers(*ours), [{"input_ids": torch.zeros(2, 3)}])

    ours, theirs = ([1.0, 2.0], [3.0, 1.0]), ([2.0, 1.0], [3.5, 1.0])
    assert compare(ours, theirs) == Agreement(2, 1.0, 3.5, 0.5)
    several = compare(([1.0, -1.0], [1.0, 1.0]), ([1.0, 1.0], [1.0, 1.0]), problem_type="multi_label_classification")
    assert several.label_agreement == 0.75
    assert compare(([1.0], [2.0]), ([1.5], [2.0])).label_agreement is None


@pytest.mark.parametrize("wrong", [{"precision": "int7"}, {"samples": 0}, {"skip": "head"}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        Onnx(**wrong)
    with pytest.raises(UserError, match=r"technique.onnx.skip: `\*qery` fits none"):
        Onnx(skip=("head", "*qery")).check(tiny.bert(), [])
