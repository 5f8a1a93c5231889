"""Models quantized by `qat` and `w8a8` run in integers in other runtimes, with the same scales and ranges."""

import copy
import importlib

import onnx
import onnxruntime
import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_onnx import every_shape, make_distinct, needs_vnni
from transformers import BertConfig, BertForSequenceClassification

from compress.errors import PostconditionError, UserError
from compress.exporting.agreement import measure_agreement
from compress.models.matrices import matrices
from compress.runtimes.torch import load
from compress.technique import Training
from compress.techniques.finetune import FineTune
from compress.techniques.onnx import Onnx
from compress.techniques.openvino import OpenVINO
from compress.techniques.qat import QAT
from compress.techniques.w8a8 import W8A8

RUNTIMES = {Onnx: "onnxruntime", OpenVINO: "openvino"}
CASES = {
    "qat, head and all": (tiny.bert, lambda: QAT(samples=8, skip=("embeddings",))),
    "qat, 4 bits": (tiny.llama, lambda: QAT(samples=8, bits=4, ranges="moving_average")),
    "w8a8": (tiny.bert, lambda: W8A8(samples=8, dynamic=False, symmetric=False)),
}


def quantized(build, stage):
    model = make_distinct(build())
    module = FineTune(model, training=Training(learning_rate=1e-2))
    tiny.trainer(stage, epochs=1).fit(module, tiny.loader())
    return model


@pytest.fixture(scope="module", params=CASES)
def saved(request, tmp_path_factory):
    """Return the checkpoint of a quantized model, and the model."""
    build, stage = CASES[request.param][0], CASES[request.param][1]()
    model, folder = quantized(build, stage), tmp_path_factory.mktemp("saved")
    stage.save(copy.deepcopy(model), folder)
    return folder, model


def export(stage, model, folder):
    tiny.trainer(stage).fit(FineTune(model), tiny.loader(batches=2), tiny.loader(batches=2))
    stage.save(model, folder)
    return importlib.import_module(f"compress.runtimes.{RUNTIMES[type(stage)]}").load(folder, "")


def integer_products(exported):
    """Return the number of integer products by weights in the graph that the runtime has optimised."""
    if hasattr(exported, "compiled"):
        nodes = [node.get_rt_info() for node in exported.compiled.get_runtime_model().get_ops()]
        products = [node for node in nodes if node["layerType"].astype(str) == "FullyConnected"]
        return sum(node["primitiveType"].astype(str).lower().endswith("_i8") for node in products)
    options, path = onnxruntime.SessionOptions(), exported.path.parent / "optimised.onnx"
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(exported.path, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(path).graph.node].count("MatMulIntegerToFloat")


def input_scales(exported):
    """Return the scales of the rounded inputs."""
    if hasattr(exported, "graph"):
        nodes = [node for node in exported.graph.get_ops() if node.get_type_name() == "FakeQuantize"]
        ends = [[node.input_value(i).get_node().get_data().item() for i in (1, 2)] for node in nodes]
        return sorted({round((high - low) / 255, 7) for low, high in ends})
    stored = onnx.load(exported.path).graph.initializer
    return sorted({round(onnx.numpy_helper.to_array(s).item(), 7) for s in stored if s.name.endswith(".input_scale")})


@pytest.mark.parametrize("processor", ["any", pytest.param("vnni", marks=needs_vnni)])
@pytest.mark.parametrize("kind", RUNTIMES)
def test_an_export_multiplies_the_same_integers_in_the_same_ranges(kind, processor, saved, tmp_path):
    folder, trained = saved
    model = load(folder, "multiclass")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stage = kind(processor=processor)
    exported = export(stage, model, tmp_path)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for original in (model.eval(), trained.eval()):  # loaded, and just trained
        agreement = measure_agreement(original, exported, every_shape())
        # Sums in another order sometimes round an input to the next integer.
        assert agreement.max_logit_difference < 0.005 * agreement.largest_logit and agreement.label_agreement == 1

    layers = {name: one.quantized for name, one in model.named_modules() if getattr(one, "quantized", None)}
    products = integer_products(exported)
    wide = processor == "any" and any(one.scheme.bits == 8 for one in layers.values())
    assert ("no faster than floats" in stage.limits) == wide
    if wide and kind is OpenVINO:
        assert products == 0
    else:
        assert products == len(layers)
    scales = sorted({round(one.inputs.grid.scale.item(), 7) for one in layers.values()})
    assert input_scales(exported) == pytest.approx(scales, rel=1e-5)
    integers = [p.char() for p in exported.parameters() if not p.is_floating_point()]
    assert len(integers) == len(layers)
    tensors = load_file(folder / "model.safetensors")
    for name in layers:
        if f"{name}.weight" in tensors:  # 4 bits are packed
            kept = tensors[f"{name}.weight"]
            assert kept.dtype == torch.int8 and any(torch.equal(kept, t) for p in integers for t in (p, p.T))


@pytest.mark.parametrize("kind", RUNTIMES)
def test_answers_that_rounding_does_not_explain_are_no_result(kind, tmp_path, monkeypatch):
    model = quantized(tiny.bert, W8A8(samples=8, dynamic=False))
    runtime = importlib.import_module(f"compress.runtimes.{RUNTIMES[kind]}").Model
    answer = runtime.__call__

    def answer_wrong(self, **batch):
        output = answer(self, **batch)
        output.logits = output.logits * 1.5
        return output

    monkeypatch.setattr(runtime, "__call__", answer_wrong)
    with pytest.raises(PostconditionError, match="answers differ by 50%"):
        export(kind(), model, tmp_path)


@pytest.mark.parametrize("kind", RUNTIMES)
def test_a_weight_is_a_byte_on_disk_and_a_stage_of_the_same_fit_is_kept_too(kind, tmp_path):
    wide = {**tiny.SHAPE, "hidden_size": 128, "intermediate_size": 256}
    model, sizes = BertForSequenceClassification(BertConfig(**wide)), []
    for name, stages in (("floats", []), ("integers", [W8A8(samples=8, dynamic=False)])):
        (tmp_path / name).mkdir()
        stage = kind()
        tiny.trainer(*stages, stage).fit(FineTune(model), tiny.loader())
        stage.save(model, tmp_path / name)
        weights = importlib.import_module(f"compress.runtimes.{stage.runtime}").WEIGHTS[0]
        sizes.append(sum(path.stat().st_size for path in (tmp_path / name).glob(weights)))
    weights = sum(layer.weight.numel() for layer in matrices(model).values())
    assert sizes[0] - sizes[1] > 2.5 * weights


@pytest.mark.parametrize("kind", RUNTIMES)
@pytest.mark.parametrize(
    ("stage", "settings", "sentence"),
    [
        (W8A8(samples=8), {}, "dynamic is true, a range for every token"),
        (W8A8(samples=8, dynamic=False), {"precision": "fp16"}, "precision is fp16, which would discard the integers"),
        (QAT(samples=8, group_size=16), {}, "group_size is 16; .* one scale a row"),
    ],
)
def test_integers_that_cannot_be_kept_are_refused_in_a_script_too(kind, stage, settings, sentence):
    model = quantized(tiny.bert, stage)
    with pytest.raises(UserError, match=sentence):
        tiny.trainer(kind(**settings)).fit(FineTune(model), tiny.loader())
