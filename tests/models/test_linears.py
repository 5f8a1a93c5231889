"""GPT-2's transposed layers as plain Linear layers, in the model, in its config and in an artifact."""

import architectures
import pytest
import tiny
import torch
from transformers.pytorch_utils import Conv1D

from compress.models.depth import drop_blocks
from compress.models.linears import copy_with_linear_layers, use_linear_layers
from compress.models.matrices import matrices
from compress.models.shapes import build_cut_class, record_shapes, shape_blocks
from compress.runtimes.torch import describe_loading, load
from compress.techniques.gptq import GPTQ


def answer(model):
    with torch.no_grad():
        return model.eval()(**architectures.inputs(1)).logits


@pytest.mark.parametrize("lm", [False, True])
def test_linear_layers_compute_the_same_with_the_same_parameters(lm):
    model = architectures.build("gpt2", lm)
    expected, parameters = answer(model), {id(p) for p in model.parameters()}
    seen = {name: matrix.weight.clone() for name, matrix in matrices(model).items()}
    use_linear_layers(model)
    assert torch.allclose(answer(model), expected, atol=1e-6) and {id(p) for p in model.parameters()} == parameters
    assert all(matrix.weight.equal(seen[name]) for name, matrix in matrices(model).items())
    assert not any(isinstance(module, Conv1D) for module in model.modules())
    assert model.config.compress == {"linear": True}


def test_a_model_without_transposed_layers_stays_as_it_is():
    model = architectures.build("llama")
    use_linear_layers(model)
    assert copy_with_linear_layers(model) is model and not hasattr(model.config, "compress")


def test_fewer_heads_and_fewer_blocks_keep_the_layers_linear():
    model = architectures.build("gpt2")
    use_linear_layers(model)
    shape_blocks(model, ffn=[32] * (architectures.BLOCKS - 1) + [16])
    record_shapes(model)
    assert model.config.compress["linear"] is True and model.config.compress["ffn"][-1] == 16
    drop_blocks(model, [0])
    built = build_cut_class(type(model)).from_config(model.config)
    assert [p.shape for p in built.parameters()] == [p.shape for p in model.parameters()]


def test_an_artifact_of_packed_integers_loads_and_its_card_says_by_what(tmp_path):
    model, stage = architectures.build("gpt2", True), GPTQ(group_size=16, samples=8)
    tiny.trainer(stage).fit(tiny.Theirs(model), tiny.loader(lm=True))
    expected = answer(model)
    stage.save(model, tmp_path)
    assert torch.allclose(answer(load(tmp_path, "lm")), expected, atol=1e-5)
    loading = describe_loading(tmp_path, "lm")
    assert loading.needs_us and "Conv1D" in loading.notes[0]
