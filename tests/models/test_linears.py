"""GPT-2's transposed layers and stacked experts as plain Linear layers: in the model, its config and an artifact."""

import architectures
import pytest
import tiny
import torch
from transformers.pytorch_utils import Conv1D

from compress.formats.packed import list_packed_layers
from compress.models.depth import drop_blocks
from compress.models.linears import copy_with_linear_layers, use_linear_layers
from compress.models.matrices import find_zeros, is_expert_list, matrices
from compress.models.shapes import build_cut_class, record_shapes, shape_blocks
from compress.runtimes import onnxruntime, openvino
from compress.runtimes.torch import describe_loading, load
from compress.techniques.gptq import GPTQ
from compress.techniques.onnx import Onnx
from compress.techniques.openvino import OpenVINO
from compress.techniques.prune import Prune

REPLACED = {"gpt2": ["Conv1D"], "mixtral": ["experts"], "qwen3_moe": ["experts"]}


def answer(model):
    batch = architectures.inputs(1)
    with torch.no_grad():
        logits = model(**batch).logits
    return logits[batch["attention_mask"].bool()] if logits.ndim == 3 else logits


@pytest.mark.parametrize("name", REPLACED)
def test_linear_layers_compute_the_same(name):
    model = architectures.build(name)
    expected, before = answer(model), {name: matrix.weight.clone() for name, matrix in matrices(model).items()}
    use_linear_layers(model)
    assert torch.allclose(answer(model), expected, atol=1e-6)
    after = matrices(model)
    assert {type(matrix.module) for matrix in after.values()} == {torch.nn.Linear}
    assert {name: matrix.weight.equal(before[name]) for name, matrix in after.items()} == dict.fromkeys(before, True)
    assert model.config.compress == {"linear": REPLACED[name]}
    assert not any(isinstance(module, Conv1D) or is_expert_list(module) for module in model.modules())


def test_transposed_layers_keep_their_parameters():
    model = architectures.build("gpt2")
    parameters = {id(parameter) for parameter in model.parameters()}
    use_linear_layers(model)
    assert {id(parameter) for parameter in model.parameters()} == parameters


def test_split_experts_train_as_they_did():
    model = architectures.build("mixtral")
    model.model.layers[0].mlp.experts.down_proj.requires_grad_(False)
    use_linear_layers(model)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == [f"model.layers.0.mlp.experts.{i}.down_proj.weight" for i in range(4)]


def test_a_model_of_linear_layers_stays_as_it_is():
    model = architectures.build("llama")
    use_linear_layers(model)
    assert copy_with_linear_layers(model) is model and not hasattr(model.config, "compress")


def test_fewer_channels_and_fewer_blocks_keep_the_layers_linear():
    model = architectures.build("gpt2")
    use_linear_layers(model)
    shape_blocks(model, ffn=[32] * (architectures.BLOCKS - 1) + [16])
    record_shapes(model)
    assert model.config.compress == {"linear": ["Conv1D"], "ffn": [32] * (architectures.BLOCKS - 1) + [16]}
    drop_blocks(model, [0])
    built = build_cut_class(type(model)).from_config(model.config)
    assert [p.shape for p in built.parameters()] == [p.shape for p in model.parameters()]


@pytest.mark.parametrize("name", REPLACED)
def test_packed_integers_reload_keep_their_zeros_and_become_graphs(name, tmp_path):
    model, stage = architectures.build(name, True), GPTQ(group_size=16, samples=8)
    tiny.trainer(Prune(sparsity=0.5)).fit(tiny.Theirs(model), architectures.loader(2, True))
    zeros = find_zeros(model)
    tiny.trainer(stage).fit(tiny.Theirs(model), architectures.loader(2, True))
    expected = answer(model)
    stage.save(model, tmp_path / "packed")
    reloaded = load(tmp_path / "packed", "lm")
    assert torch.allclose(answer(reloaded), expected, atol=1e-5)
    assert list_packed_layers(tmp_path / "packed") == set(matrices(reloaded))
    assert zeros.keys() == matrices(reloaded).keys()
    assert not any(matrix.weight[zeros[name]].any() for name, matrix in matrices(reloaded).items())
    loading = describe_loading(tmp_path / "packed", "lm")
    assert loading.needs_us and "Linear layers" in loading.notes[0]
    for export, runtime in ((Onnx(), onnxruntime), (OpenVINO(), openvino)):
        folder = tmp_path / type(export).__name__
        folder.mkdir()
        tiny.trainer(export).fit(tiny.Theirs(load(tmp_path / "packed", "lm")), architectures.loader(2, True))
        export.save(reloaded, folder)
        assert torch.allclose(answer(runtime.load(folder, "lm")), expected, atol=1e-4)
