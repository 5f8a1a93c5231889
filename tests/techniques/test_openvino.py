import json
import signal
import sys

import pytest
import tiny
import torch
from pydantic import ValidationError
from test_kills import FORK
from test_onnx import check_decoding, every_shape, make_distinct, tied, uneven
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from compress.errors import UserError
from compress.exporting.agreement import Agreement, measure_agreement
from compress.exporting.tracing import select_inputs
from compress.formats.packed import read_integers, save_model
from compress.maths.rounding import Scheme
from compress.models.matrices import find_all_matrices, matrices
from compress.runtimes.openvino import SCALE, ZERO, load, read_constant
from compress.runtimes.torch import load as load_torch
from compress.tasks.metrics import TaskMetrics
from compress.tasks.task import Task
from compress.techniques.finetune import FineTune
from compress.techniques.gptq import quantize_layers
from compress.techniques.openvino import OpenVINO
from compress.techniques.prune import Prune


def export(model, folder, *before, lm=False, **settings):
    """Return the stage and its saved model, loaded again."""
    stage = OpenVINO(**{"samples": 8, "group_size": 8, **settings})
    for one in (*before, stage):
        tiny.trainer(one).fit(FineTune(model), tiny.loader(batches=2, lm=lm), tiny.loader(batches=2, lm=lm))
    stage.save(model, folder)
    return stage, load(folder, "")


def integers_of(exported):
    return [p for p in exported.parameters() if not p.is_floating_point()]


@pytest.mark.parametrize("build", [tiny.bert, tied, lambda: uneven(tiny.bert()), lambda: uneven(tiny.llama())])
def test_the_graph_answers_as_the_model_for_batches_of_any_shape(build, tmp_path):
    model = make_distinct(build())
    stage, exported = export(model, tmp_path, lm=build is tied)
    agreement = measure_agreement(model.eval(), exported, every_shape())
    assert agreement.max_logit_difference < 1e-5 * agreement.largest_logit and agreement.label_agreement == 1
    assert exported.compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"
    assert exported.compiled.get_property("INFERENCE_NUM_THREADS") == torch.get_num_threads()
    assert stage.exported is None  # the chain compares the artifact with the model itself
    assert sum(p.numel() for p in exported.parameters()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("build", "precision", "share"),
    [
        (tiny.bert, "fp16", 0.01),
        (tiny.bert, "bf16", 0.1),
        (tiny.bert, "int8", 0.1),
        (tiny.bert, "int8_weights", 0.1),
        (tiny.llama_lm, "int4_weights", 0.5),
        (tied, "int8", 0.5),
    ],
)
def test_a_lower_precision_stays_near_and_leaves_the_head_in_floats_and_reloads_exactly(
    build, precision, share, tmp_path
):
    model = make_distinct(build())
    stage, exported = export(model, tmp_path, precision=precision, lm=build in (tiny.llama_lm, tied))
    agreement = measure_agreement(model.eval(), exported, every_shape())
    assert 0 < agreement.max_logit_difference < share * agreement.largest_logit
    for batch in every_shape():
        batch.pop("labels")
        assert torch.equal(stage.exported(**batch).logits, exported(**batch).logits)
    layers = find_all_matrices(model, embeddings=True, head=False).values() if precision.startswith("int") else ()
    assert sum(p.numel() for p in integers_of(exported)) == sum(layer.weight.numel() for layer in layers)
    assert sum(p.numel() for p in exported.parameters()) == sum(p.numel() for p in model.parameters())
    table = model.get_input_embeddings().weight
    if precision.startswith("int"):  # a scale for every row, because tokens are looked up by row
        (stored,) = (p for p in integers_of(exported) if p.shape == table.shape)
        assert (stored.abs().amax(1) >= 127).equal(table.any(1))


@pytest.mark.parametrize("skip", [(), ("embeddings", "head")])
def test_what_is_quantized_can_be_chosen(skip, tmp_path):
    model = make_distinct(tiny.bert())
    _, exported = export(model, tmp_path, precision="int8_weights", skip=skip)
    layers = find_all_matrices(model, embeddings=not skip, head=not skip).values()
    assert sum(p.numel() for p in integers_of(exported)) == sum(layer.weight.numel() for layer in layers)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Return a packed artifact with layers of every kind, and its model loaded by PyTorch."""
    folder, model = tmp_path_factory.mktemp("packed"), make_distinct(tiny.bert())
    kinds = [Scheme(4, 16), Scheme(4, -1, False), Scheme(8, 16), Scheme(8, -1, False), Scheme(2, 16), Scheme(3, 8)]
    schemes = dict(zip(matrices(model), kinds * 2))
    batches = [{key: value for key, value in tiny.batch().items() if key != "labels"}]
    outcomes = quantize_layers(model, matrices(model), batches, schemes, damping=0.01, act_order=True)
    save_model(model, {name: outcome.quantized for name, outcome in outcomes.items()}, folder)
    return folder, load_torch(folder, "multiclass"), schemes


def test_packed_integers_stay_as_they_are(packed, tmp_path):
    folder, model, schemes = packed
    stage, exported = export(model, tmp_path, source=folder)
    stored = read_integers(folder)
    assert {name: layer.scheme for name, layer in stored.items()} == schemes
    constants = {n.get_friendly_name(): n for n in exported.graph.get_ops() if n.get_type_name() == "Constant"}
    kinds = {}
    for name, (scheme, integers, grid) in stored.items():
        weight = constants[f"self.model.{name}.weight"]
        kinds[name] = weight.get_element_type().to_string()
        lift = 0 if kinds[name][0] == "i" else -scheme.lowest
        assert torch.equal(read_constant(weight).view(integers.shape) - lift, integers.float())
        assert torch.equal(read_constant(constants[f"self.model.{name}.weight{SCALE}"]).flatten(), grid.scale.flatten())
        if not scheme.symmetric:
            zero = read_constant(constants[f"self.model.{name}.weight{ZERO}"]).view(grid.zero.shape)
            assert torch.equal(zero - lift, grid.zero.float())
    assert [kinds[name] for name in schemes] == ["i4", "u4", "i8", "u8", "u2", "u3"] * 2 and "3 bits" in stage.limits
    assert (tmp_path / "openvino_model.bin").stat().st_size < (folder / "model.safetensors").stat().st_size
    assert sum(p.numel() for p in exported.parameters()) == sum(p.numel() for p in model.parameters())
    nonzeros = sum(int(layer.weight.count_nonzero()) for layer in matrices(model).values())
    assert sum(int(p.count_nonzero()) for p in integers_of(exported)) == nonzeros
    agreement = measure_agreement(model.eval(), exported, every_shape())
    assert agreement.max_logit_difference < 1e-5 * agreement.largest_logit and stage.exported is None


@pytest.mark.parametrize(("precision", "tables"), [("int8_weights", "i8"), ("bf16", "f16")])
def test_what_packed_weights_left_in_floats_can_be_rounded_beside_them(precision, tables, packed, tmp_path):
    folder, model, _ = packed
    _, exported = export(model, tmp_path, source=folder, precision=precision)
    constants = [n for n in exported.graph.get_ops() if n.get_type_name() == "Constant"]
    kinds = [one.get_element_type().to_string() for one in constants if one.shape == [60, 32]]
    assert kinds == [tables]
    of_three_bits = [one for one in constants if one.get_element_type().to_string() == "u3"]
    assert len(of_three_bits) == 2 * 2  # with their zero points
    agreement = measure_agreement(model.eval(), exported, every_shape())
    assert 0 < agreement.max_logit_difference < 0.1 * agreement.largest_logit


def test_what_a_pattern_names_stays_in_floats_and_zeros_stay_zeros(tmp_path):
    model = make_distinct(tiny.bert())
    skip = ("embeddings", "head", "*output.dense")
    _, exported = export(model, tmp_path, Prune(sparsity=0.5), precision="int8_weights", skip=skip)
    left = sum(layer.weight.numel() for name, layer in matrices(model).items() if not name.endswith("output.dense"))
    integers = torch.cat([p.flatten() for p in integers_of(exported)])
    assert len(integers) == left and sum(int((p == 0).sum()) for p in exported.parameters()) >= 0.5 * 2 * 8192


def test_it_decodes_with_what_it_keeps_of_earlier_tokens_as_transformers_does(tmp_path):
    model = make_distinct(uneven(tied()))
    _, exported = export(model, tmp_path, lm=True)
    check_decoding(model, exported)


@pytest.mark.parametrize("max_drop", [0, 100])
def test_layers_stay_floats_until_no_more_is_lost_than_may_be(max_drop, tmp_path):
    shape = {**tiny.SHAPE, "num_hidden_layers": 1}
    model = make_distinct(BertForSequenceClassification(BertConfig(**shape, num_labels=1)).eval())
    batches = [select_inputs(tiny.batch(rows=16, seed=seed), model) for seed in range(2)]
    with torch.no_grad():  # the labels are its own answers, so any change is worse
        batches = [{**batch, "labels": model(**batch).logits[:, 0]} for batch in batches]
    task = Task(name="t", kind="regression", metrics=("pearson",), primary="pearson", labels=())
    skip = ("embeddings", "head", "*attention*")  # each layer that goes back to floats takes a quantization
    stage = OpenVINO(precision="int8", samples=8, max_drop=max_drop, skip=skip, task=task, metrics=TaskMetrics(task))
    module = FineTune(model, TaskMetrics(task))
    tiny.trainer(stage).fit(module, tiny.loader(batches=2), DataLoader(batches, batch_size=None))
    stage.save(model, tmp_path)
    exported = load(tmp_path, "")
    every = sum(layer.weight.numel() for name, layer in matrices(model).items() if "attention" not in name)
    rounded = sum(p.numel() for p in integers_of(exported))
    assert rounded < every if max_drop == 0 else rounded == every
    assert (
        exported.compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"
    )  # the precision of the measured drop


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
    stage, _ = export(model, tmp_path, precision="bf16")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()) and model.training
    stage.report(tmp_path)
    stored = Agreement(**json.loads((tmp_path / "agreement.json").read_text()))
    assert stored.examples == 8 and stored.max_logit_difference > 0 and stored.label_agreement > 0.5
    settings = json.loads((tmp_path / "compile.json").read_text())
    assert settings["INFERENCE_PRECISION_HINT"] == "bf16" and "PERFORMANCE_HINT" not in settings


def test_a_drop_cannot_be_bounded_without_a_metric_or_a_validation_split():
    stage = OpenVINO(precision="int8", max_drop=1, samples=2)
    with pytest.raises(UserError, match=r"max_drop is 1; it needs the metric on validation text\. Pass metrics and"):
        tiny.trainer(stage).fit(FineTune(tiny.bert()), tiny.loader(batches=1))


@pytest.mark.parametrize("wrong", [{"precision": "nf4"}, {"samples": 0}, {"group_size": -2}, {"max_drop": -1}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        OpenVINO(**wrong)


def test_what_does_not_fit_the_model_is_reported_from_the_shapes_alone():
    with torch.device("meta"):
        skeleton = tiny.bert()
    with pytest.raises(UserError, match=r"technique.openvino.skip has the pattern `\*qery`, which matches no layer"):
        OpenVINO(skip=("head", "*qery")).check(skeleton, [])
    with pytest.raises(UserError, match=r"technique.openvino.group_size is 48, which does not divide the 32 inputs"):
        OpenVINO(precision="int4_weights", group_size=48).check(skeleton, [])
    OpenVINO(precision="int8", group_size=48).check(skeleton, [])


HEARD = 42


def hear_a_signal(folder):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(HEARD))
    first, second = (load(folder, "") for _ in range(2))
    del first
    del second
    signal.raise_signal(signal.SIGTERM)


def test_a_process_in_which_graphs_came_and_went_still_hears_signals(tmp_path):
    export(tiny.bert(), tmp_path)
    process = FORK.Process(target=hear_a_signal, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == HEARD


def test_no_library_reports_a_conversion_to_its_makers(tmp_path):
    export(tiny.bert(), tmp_path, precision="int8_weights")
    import nncf
    from openvino.tools.ovc import telemetry_utils

    assert telemetry_utils.tm.__name__.endswith("telemetry_stub")
    assert isinstance(nncf.telemetry.telemetry, nncf.telemetry.wrapper.NNCFTelemetryStub)
