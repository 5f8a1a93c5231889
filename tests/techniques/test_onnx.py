import json
import os
from collections import Counter
from importlib.metadata import version

import pytest
import tiny
import torch
from onnx import numpy_helper
from pydantic import ValidationError
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from compress.errors import UserError
from compress.exporting.agreement import Agreement, measure_agreement
from compress.exporting.tracing import select_inputs
from compress.formats import onnx as onnx_format
from compress.formats.nbits import round_weight
from compress.formats.packed import read_integers
from compress.maths.rounding import Scheme
from compress.models.layers import detect_task_kind
from compress.models.matrices import find_all_matrices, matrices
from compress.models.shapes import record_shapes, shape_blocks
from compress.runtimes.onnxruntime import load
from compress.runtimes.processor import adds_exactly
from compress.runtimes.torch import load as load_torch
from compress.techniques.awq import AWQ
from compress.techniques.finetune import FineTune
from compress.techniques.gptq import GPTQ
from compress.techniques.int8 import Int8
from compress.techniques.mixed import Mixed
from compress.techniques.nf4 import NF4
from compress.techniques.onnx import Onnx
from compress.techniques.prune import Prune

needs_vnni = pytest.mark.skipif(
    not adds_exactly() or "ONEDNN_MAX_CPU_ISA" in os.environ, reason="sums of 8-bit products are not exact here"
)
NEAR = {"fp32": 1e-5, "fp16": 0.01, "int8_dynamic": 0.2, "int8_static": 0.2, "int4": 0.4}
"""Largest difference as a fraction of the largest logit, for weights as large as here."""


def check_decoding(model, exported):
    """Check that a graph that keeps a state decodes as transformers does, and scores without one."""
    batch = select_inputs(tiny.batch(rows=3, length=9, padded=False), model)
    for row in range(3):
        batch["attention_mask"][row, : 2 * row] = 0  # texts of a batch end together
    expected = model.eval().generate(**batch, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(exported.generate(**batch, max_new_tokens=6), expected)
    alone = [exported(**batch).logits for _ in range(2)]  # scoring leaves no state
    assert torch.equal(*alone)


def make_distinct(model):
    """Return the model with weights so large, and biases so different, that a mistake in any of them shows."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
        elif ".layer" in name:
            parameter.data *= 6
    return model


def uneven(model):
    """Return the model with blocks cut to different shapes."""
    shape_blocks(model, [2, 4] if model.config.model_type == "llama" else [3, 1], [40, 24])
    record_shapes(model)
    return model


def tied():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**tiny.SHAPE, num_key_value_heads=2, pad_token_id=0, tie_word_embeddings=True))


def export(model, folder, *before, **settings):
    """Return the stage and its saved model, loaded again."""
    stage = Onnx(**{"samples": 8, **settings})
    lm = model.config.architectures is None and isinstance(model, LlamaForCausalLM)
    for one in (*before, stage):
        tiny.trainer(one).fit(FineTune(model), tiny.loader(lm=lm), tiny.loader(lm=lm))
    stage.save(model, folder)
    return stage, load(folder, "")


def every_shape():
    """Return batches of other shapes than the traced batch, up to the models' number of positions."""
    return [tiny.batch(rows, length, seed=7) for rows, length in ((1, 3), (2, 38), (5, 10))]


def in_onnx(folder):
    import onnx

    return onnx.load(folder / "model.onnx").graph


@pytest.mark.parametrize(
    "build", [tiny.bert, tiny.llama, tied, lambda: uneven(tiny.bert()), lambda: uneven(tiny.llama())]
)
def test_the_graph_answers_as_the_model_for_batches_of_any_shape(build, tmp_path):
    model = make_distinct(build())
    stage, exported = export(model, tmp_path)
    agreement = measure_agreement(model.eval(), exported, every_shape())
    assert agreement.max_logit_difference < 1e-5 * agreement.largest_logit and agreement.label_agreement == 1
    assert stage.exported is None  # the chain compares the artifact with the model itself
    assert sum(p.numel() for p in exported.parameters()) == sum(p.numel() for p in model.parameters())


def test_token_types_are_an_input_where_the_texts_have_them(tmp_path):
    model = make_distinct(tiny.bert())
    types = {"token_type_ids": torch.arange(10).expand(4, 10) % 2}
    stage = Onnx()
    tiny.trainer(stage).fit(FineTune(model), [{**tiny.batch(), **types}])
    stage.save(model, tmp_path)
    agreement = measure_agreement(model.eval(), load(tmp_path, ""), [{**tiny.batch(seed=3), **types}])
    assert agreement.max_logit_difference < 1e-5 * agreement.largest_logit
    assert stage.agreement is None  # there was no validation text


@pytest.mark.parametrize(
    ("build", "precision"),
    [
        (tiny.bert, "fp16"),
        (tiny.bert, "int8_dynamic"),
        (tiny.llama_lm, "int8_dynamic"),
        (tiny.bert, "int8_static"),
        (tiny.llama, "int8_static"),
        (tiny.llama_lm, "int4"),
        (lambda: uneven(tiny.bert()), "int4"),
    ],
)
def test_a_lower_precision_stays_near_and_reloads_exactly(build, precision, tmp_path):
    model = make_distinct(build())
    stage, exported = export(model, tmp_path, precision=precision)
    agreement = measure_agreement(model.eval(), exported, every_shape())
    assert 0 < agreement.max_logit_difference < NEAR[precision] * agreement.largest_logit
    for batch in every_shape():
        batch.pop("labels")
        assert torch.equal(stage.exported(**batch).logits, exported(**batch).logits)


@pytest.mark.parametrize(
    ("precision", "embeddings"),
    [("int8_dynamic", True), ("int8_dynamic", False), ("int8_static", True), ("int4", False)],
)
def test_integers_are_the_blocks_and_the_embeddings_unless_they_are_skipped(precision, embeddings, tmp_path):
    skip = ("head",) if embeddings else ("head", "embeddings")
    model = make_distinct(tiny.bert())
    _, exported = export(model, tmp_path, precision=precision, skip=skip)
    integers = [p for p in exported.parameters() if not p.is_floating_point()]
    assert sum(map(torch.numel, integers)) == sum(
        p.weight.numel() for p in find_all_matrices(model, embeddings, False).values()
    )
    floats = [p for p in exported.parameters() if p.dtype == torch.float32]
    for name in ("classifier", "bert.pooler.dense", *([] if embeddings else ["bert.embeddings.word_embeddings"])):
        weight = model.get_submodule(name).weight
        assert any(torch.equal(p, one) for p in floats for one in (weight, weight.T))


@pytest.mark.parametrize(
    ("build", "precision"),
    [(tiny.bert, "int8_dynamic"), (tiny.llama_lm, "int8_static"), (tied, "int8_dynamic"), (tied, "int4")],
)
def test_the_head_is_quantized_if_asked_and_a_tied_one_with_its_embeddings(build, precision, tmp_path):
    model = make_distinct(build())
    _, exported = export(model, tmp_path, precision=precision, skip=())
    # Biases of the head are integers of one dimension.
    integers = sum(p.numel() for p in exported.parameters() if not p.is_floating_point() and p.ndim > 1)
    assert integers == sum(layer.weight.numel() for layer in find_all_matrices(model, True, True).values())
    agreement = measure_agreement(model.eval(), exported, every_shape())
    assert agreement.max_logit_difference < NEAR[precision] * agreement.largest_logit


@pytest.mark.parametrize("precision", ["int8_dynamic", "int4"])
def test_an_embedding_is_rounded_to_the_nearest_of_255_values(precision, tmp_path):
    model = make_distinct(tiny.bert())
    export(model, tmp_path, precision=precision)
    kept = {one.name: numpy_helper.to_array(one) for one in in_onnx(tmp_path).initializer}
    weight = model.bert.embeddings.word_embeddings.weight.detach().numpy()
    (name,) = (name for name, one in kept.items() if one.shape == weight.shape and name.endswith("_quantized"))
    scale = kept[name.replace("_quantized", "_scale")]
    assert (abs(kept[name] * scale - weight) <= abs(weight).max(1, keepdims=True) / 254 * 1.001).all()


@pytest.mark.parametrize(("pattern", "left"), [("*output.dense", 32 * 32 + 32 * 64), ("*query", 3 * 32 * 32)])
def test_what_a_pattern_names_stays_in_floats(pattern, left, tmp_path):
    model = make_distinct(tiny.bert())
    skip = ("embeddings", "head", pattern)  # int8 fuses the three layers of attention
    _, exported = export(model, tmp_path, precision="int8_dynamic", skip=skip)
    integers = sum(p.numel() for p in exported.parameters() if p.dtype == torch.int8)
    assert integers == sum(layer.weight.numel() for layer in matrices(model).values()) - 2 * left


def test_a_static_scale_is_that_of_the_calibration_text(tmp_path):
    model, stage = make_distinct(tiny.bert()), Onnx(precision="int8_static", samples=4)
    batches = [tiny.batch(padded=False, seed=seed) for seed in range(2)]
    tiny.trainer(stage).fit(FineTune(model), batches)
    stage.save(model, tmp_path)
    with torch.no_grad():
        first, both = (model.eval().bert.embeddings(torch.cat([b["input_ids"] for b in batches[:i]])) for i in (1, 2))
    kept = in_onnx(tmp_path).initializer
    scales = [numpy_helper.to_array(one).item() for one in kept if one.name.endswith("output_0_scale")]
    assert (first.max() - first.min()).item() / 255 in [pytest.approx(scale) for scale in scales]
    assert (both.max() - both.min()).item() / 255 not in [pytest.approx(scale) for scale in scales]


@pytest.mark.parametrize("precision", ["int8_dynamic", "int4"])
def test_zeros_stay_zeros(precision, tmp_path):
    model = make_distinct(tiny.bert())
    _, exported = export(model, tmp_path, Prune(sparsity=0.5), precision=precision, symmetric=precision == "int4")
    zeros = sum(int((p == 0).sum()) for p in exported.parameters())
    assert zeros >= sum(int((layer.weight == 0).sum()) for layer in matrices(model).values()) > 0


def packed_by(before, model, folder):
    """Return the model of an earlier stage, loaded from its artifact."""
    tiny.trainer(before).fit(FineTune(model), tiny.loader())
    folder.mkdir()
    before.save(model, folder)
    return load_torch(folder, detect_task_kind(model))


ROUNDED = {
    "gptq": lambda: GPTQ(group_size=16, samples=8),
    "gptq with zero points, a scale a row": lambda: GPTQ(group_size=-1, symmetric=False, samples=8),
    "gptq 2": lambda: GPTQ(bits=2, group_size=32, samples=8),
    "gptq 3": lambda: GPTQ(bits=3, group_size=32, symmetric=False, samples=8),
    "gptq 8": lambda: GPTQ(bits=8, group_size=32, samples=8),
    "mixed": lambda: Mixed(average_bits=5.5, group_size=32, samples=8, measured=4),
}


@pytest.mark.parametrize("by", ROUNDED)
def test_the_integers_of_a_quantized_model_are_those_in_the_graph(by, tmp_path):
    packed = packed_by(ROUNDED[by](), make_distinct(tiny.bert()), tmp_path / "packed")
    _, exported = export(packed, tmp_path, source=tmp_path / "packed", activations="float32")
    agreement = measure_agreement(packed.eval(), exported, every_shape())
    assert agreement.max_logit_difference < 1e-5 * agreement.largest_logit
    ours = read_integers(tmp_path / "packed")
    theirs = [p for p in exported.parameters() if not p.is_floating_point()]
    for _, integers, (scale, zero) in ours.values():
        expected = (integers.unflatten(1, (scale.shape[1], -1)) - zero[..., None]).flatten(1)
        assert any(torch.equal(expected.short(), p) for p in theirs if p.shape == expected.shape)
    assert len(theirs) == len(ours)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize(("block_size", "symmetric"), [(16, True), (64, False)])
def test_int4_is_the_model_with_every_block_rounded(block_size, symmetric, tmp_path):
    model = make_distinct(tiny.bert())
    settings = {"block_size": block_size, "symmetric": symmetric, "activations": "float32"}
    _, exported = export(model, tmp_path, precision="int4", skip=("embeddings", "head"), **settings)
    for linear in matrices(model).values():
        integers, (scale, zero) = round_weight(linear.weight.detach(), Scheme(4, block_size, symmetric))[1:]
        groups = torch.arange(linear.inputs) // block_size
        linear.weight.copy_((integers - zero[:, groups]) * scale[:, groups])
    agreement = measure_agreement(model.eval(), exported, every_shape())
    assert agreement.max_logit_difference < 1e-5 * agreement.largest_logit


@pytest.mark.parametrize(("build", "by"), [(tiny.llama, AWQ), (lambda: uneven(tiny.bert()), GPTQ)])
def test_activations_of_8_bits_are_near(build, by, tmp_path):
    packed = packed_by(by(group_size=-1, samples=8), make_distinct(build()), tmp_path / "packed")
    stage, exported = export(packed, tmp_path, source=tmp_path / "packed")
    agreement = measure_agreement(packed.eval(), exported, every_shape())
    assert 0 < agreement.max_logit_difference < 0.05 * agreement.largest_logit
    assert not stage.limits


@pytest.mark.parametrize("before", [NF4, lambda: NF4("fp4", False, 32), Int8])
def test_the_numbers_of_bitsandbytes_are_kept(before, tmp_path):
    torch.manual_seed(0)
    config = BertConfig(**{**tiny.SHAPE, "hidden_size": 64}, max_position_embeddings=40, num_labels=3)
    model = make_distinct(BertForSequenceClassification(config))
    packed = packed_by(before(), model, tmp_path / "packed")
    stage, exported = export(packed, tmp_path, activations="float32")
    agreement = measure_agreement(packed.eval(), exported, every_shape())  # now plain layers of the same values
    assert agreement.max_logit_difference < 1e-5 * agreement.largest_logit
    blocks = sum(layer.weight.numel() for layer in matrices(packed).values())
    kept = [p for p in exported.parameters() if not p.is_floating_point()]
    assert sum(p.numel() for p in kept) == blocks
    assert ("slower than floats" in stage.limits) == (before is not Int8)


def test_packed_weights_become_floats_on_request_and_the_limits_say_so(tmp_path):
    packed = packed_by(GPTQ(group_size=16, samples=8), make_distinct(tiny.bert()), tmp_path / "packed")
    stage, exported = export(packed, tmp_path, source=tmp_path / "packed", precision="fp32")
    assert all(p.is_floating_point() for p in exported.parameters()) and "precision=null keeps" in stage.limits
    agreement = measure_agreement(packed.eval(), exported, every_shape())
    assert agreement.max_logit_difference < 1e-5 * agreement.largest_logit


def test_int4_after_gptq_rounds_what_gptq_has_not(tmp_path):
    packed = packed_by(GPTQ(group_size=16, samples=8), make_distinct(tiny.bert()), tmp_path / "packed")
    (tmp_path / "kept").mkdir()
    _, kept = export(packed, tmp_path / "kept", source=tmp_path / "packed")
    _, exported = export(packed, tmp_path, source=tmp_path / "packed", precision="int4", skip=())
    integers = [p for p in exported.parameters() if not p.is_floating_point()]
    assert len(integers) == len(list(find_all_matrices(packed, True, True)))
    for one in kept.parameters():
        assert one.is_floating_point() or any(torch.equal(one, p) for p in integers)


def test_a_bfloat16_model_is_exported_in_float32(tmp_path):
    model = make_distinct(tiny.llama()).bfloat16()
    _, exported = export(model, tmp_path)
    assert {p.dtype for p in exported.parameters()} == {torch.float32}
    agreement = measure_agreement(model.eval(), exported, every_shape())
    assert agreement.max_logit_difference < 1e-5 * agreement.largest_logit


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
        export(make_distinct(model), tmp_path / name)
    sizes = [(tmp_path / name / "model.onnx").stat().st_size for name in ("tied", "untied")]
    assert sizes[1] - sizes[0] > 0.9 * 4 * 60 * 32


@pytest.mark.parametrize("precision", ["fp32", "int8_dynamic", "int8_static", "int4"])
def test_the_tensors_of_a_large_model_are_in_a_second_file(precision, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_format, "LARGEST", 1000)
    model = make_distinct(tiny.bert())
    _, exported = export(model, tmp_path, precision=precision)
    sizes = [numpy_helper.to_array(one).nbytes for one in in_onnx(tmp_path).initializer]
    stored = sum(size for size in sizes if size >= 1024)  # onnx keeps smaller tensors in the graph's file
    assert 0.8 * stored < (tmp_path / "model.onnx.data").stat().st_size < 1.2 * stored + 4 * 4096  # aligned to pages
    agreement = measure_agreement(model.eval(), exported, every_shape())
    assert agreement.max_logit_difference < NEAR[precision] * agreement.largest_logit
    assert sum(p.numel() for p in exported.parameters()) == sum(p.numel() for p in model.parameters())


def test_the_model_is_left_as_it_was(tmp_path):
    model = tiny.bert()
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    implementation = model.config._attn_implementation
    export(model, tmp_path, precision="int8_static")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training and model.config._attn_implementation == implementation


@pytest.mark.parametrize("build", [tied, lambda: uneven(tiny.llama_lm())])
def test_a_language_model_decodes_with_a_cache_as_transformers_does(build, tmp_path):
    model = make_distinct(build())
    _, exported = export(model, tmp_path)
    texts = {
        "input_ids": torch.tensor([[7, 8, 9], [0, 11, 12]]),
        "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]]),
    }
    new = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    for batch in (texts, {name: value[:1] for name, value in texts.items()}):
        assert torch.equal(exported.generate(**batch, max_new_tokens=12), model.eval().generate(**batch, **new))
    (end,) = exported.generate(texts["input_ids"][:1], max_new_tokens=1)[:, -1]
    exported.config.eos_token_id = model.config.eos_token_id = end.item()
    assert (
        exported.generate(**texts, max_new_tokens=12).tolist()
        == model.generate(**texts, **new, eos_token_id=end.item()).tolist()
    )


@pytest.mark.parametrize("precision", ["int8_static", "int4"])
def test_a_token_after_its_past_answers_as_in_the_whole_text(precision, tmp_path):
    _, exported = export(make_distinct(tiny.llama_lm()), tmp_path, precision=precision)
    ids = tiny.batch(2, 9, padded=False)["input_ids"]
    mask = torch.ones_like(ids)
    whole = exported(input_ids=ids, attention_mask=mask).logits
    answers, past = [], None
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        answer = exported(input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], past=past)
        answers, past = [*answers, answer.logits], answer.past
    near = 0.1 if precision.startswith("int8") else 1e-5  # a scale of int8 inputs is shared by all tokens
    assert (torch.cat(answers, 1) - whole).abs().max() < near * whole.abs().max()


@pytest.mark.parametrize("precision", ["fp32", "int8_dynamic", "int4"])
def test_what_onnx_runtime_has_an_operator_for_is_fused(precision, tmp_path):
    export(tiny.bert(), tmp_path, precision=precision)
    count = Counter(node.op_type for node in in_onnx(tmp_path).node)
    if not count["BiasGelu"] and version("onnxruntime") < "1.31":
        pytest.skip("this ONNX Runtime does not know the masks of transformers 5")
    attention = {"fp32": "Attention", "int8_dynamic": "QAttention", "int4": "MultiHeadAttention"}[precision]
    assert count[attention] == count["BiasGelu"] == 2 and count["SkipLayerNormalization"] == 4
    assert count["EmbedLayerNormalization"] == (precision == "fp32") and not count["Softmax"]
    assert {"int8_dynamic": count["MatMulInteger"], "int4": count["MatMulNBits"]}.get(precision, 0) == (
        {"int8_dynamic": 6, "int4": 12}.get(precision, 0)
    )


def test_the_report_says_how_far_the_answers_are(tmp_path):
    stage, _ = export(make_distinct(tiny.bert()), tmp_path, precision="int8_dynamic")
    stage.report(tmp_path)
    stored = Agreement(**json.loads((tmp_path / "agreement.json").read_text()))
    assert stored.examples == 16 and stored.max_logit_difference > 0 and stored.label_agreement > 0.5


def test_disagreement_of_every_kind_of_head():
    def answers(*rows):
        return lambda **_: type("Output", (), {"logits": torch.tensor(rows)})

    def compare(ours, theirs, **config):
        model = answers(*theirs)
        model.config, model.forward = type("Config", (), config), model
        return measure_agreement(model, answers(*ours), [{"input_ids": torch.zeros(2, 3)}])

    ours, theirs = ([1.0, 2.0], [3.0, 1.0]), ([2.0, 1.0], [3.5, 1.0])
    assert compare(ours, theirs) == Agreement(2, 1.0, 3.5, 0.5)
    several = compare(([1.0, -1.0], [1.0, 1.0]), ([1.0, 1.0], [1.0, 1.0]), problem_type="multi_label_classification")
    assert several.label_agreement == 0.75
    assert compare(([1.0], [2.0]), ([1.5], [2.0])).label_agreement is None


@pytest.mark.parametrize("wrong", [{"precision": "int7"}, {"samples": 0}, {"skip": "head"}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        Onnx(**wrong)
    with pytest.raises(UserError, match=r"technique.onnx.skip has the pattern `\*qery`, which matches no layer"):
        Onnx(skip=("head", "*qery")).check(tiny.bert(), [])
