import json

import pytest
import tiny
import torch
from pydantic import ValidationError
from test_nf4 import plain, wide
from test_prune import fit
from test_shapes import INPUTS, family, logits, uneven

from compress.errors import PostconditionError, UserError
from compress.models.matrices import Matrix, find_zeros, matrices, measure_matrices
from compress.running.promises import capture_state, check_bits, check_model
from compress.runtimes import torch as runtime
from compress.techniques.int8 import Int8, make_8bit_layer
from compress.techniques.nf4 import NF4
from compress.techniques.prune import Prune

BUILDS = [*tiny.ALL, lambda: family("distilbert")]
IDS = ["bert", "roberta", "llama", "llama_lm", "distilbert"]


def quantized(model):
    return [name for name, module in model.named_modules() if type(module).__name__ == "Linear8bitLt"]


def test_two_rows_worked_by_hand():
    linear = torch.nn.Linear(4, 2)
    linear.weight.data = torch.tensor([[1.27, -0.63, 0.006, 0.0], [0.0, 0.0, 0.0, 0.0]])
    layer = make_8bit_layer(Matrix("", linear), threshold=6.0)
    assert layer.weight.tolist() == [[127, -63, 1, 0], [0, 0, 0, 0]]  # hundredths; the nearest to 0.6 is one
    layer.bias = linear.bias
    inputs = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    with torch.no_grad():
        product = layer.eval()(inputs) - linear.bias
    assert torch.allclose(product, torch.tensor([[-0.63, 0.0], [0.0, 0.0]]), atol=1e-3)  # scales have 16 bits


def test_an_outlier_is_multiplied_apart():
    torch.manual_seed(0)
    linear, inputs = torch.nn.Linear(64, 32), torch.randn(16, 64).clamp(-3, 3)
    inputs[:, 7] *= 100  # leaves few steps for the other channels of a token

    def error(threshold):
        layer = make_8bit_layer(Matrix("", linear), threshold)
        layer.bias = linear.bias
        with torch.no_grad():
            return (layer.eval()(inputs) - linear(inputs)).norm()

    assert error(6.0) < 0.3 * error(0.0)
    assert error(1000.0) == error(0.0)


@pytest.mark.parametrize(("build", "threshold"), zip(BUILDS, [0.0, 1.0, 6.0, 0.0, 1.0]), ids=IDS)
def test_it_keeps_head_and_zeros_and_reloads_to_the_same_logits_without_us(build, threshold, tmp_path):
    model = build()
    kept = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    layers = list(matrices(model))
    fit(model, Prune(sparsity=0.4))
    masks = find_zeros(model)
    before, untouched = capture_state(model), logits(model.eval())
    stage = Int8(threshold=threshold)
    fit(model, stage)
    check_model("int8", stage, before, model)
    assert quantized(model) == layers
    expected = logits(model.eval())
    assert 0 < (expected - untouched).norm() < 0.05 * untouched.norm()
    stage.save(model, tmp_path)
    reloaded = plain(model).from_pretrained(tmp_path)
    assert quantized(reloaded) == layers and {*masks} <= {*find_zeros(reloaded)}
    assert all((reloaded.get_submodule(layer).weight[mask] == 0).all() for layer, mask in masks.items())
    outside = {key: tensor for key, tensor in reloaded.state_dict().items() if not key.startswith(tuple(layers))}
    assert any("score" in key or "classifier" in key or "lm_head" in key for key in outside)
    assert all(torch.equal(tensor, kept[key]) for key, tensor in outside.items())
    assert torch.equal(logits(reloaded), expected)
    assert torch.equal(logits(runtime.load(tmp_path, "lm" if hasattr(model, "lm_head") else "multiclass")), expected)
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert said["load_in_8bit"] and said["llm_int8_threshold"] == threshold


def test_as_many_bits_are_stored_as_asked(tmp_path):
    model, stage = tiny.bert(), Int8()
    fit(model, stage)
    sizes = measure_matrices(model)
    stage.save(model, tmp_path)
    check_bits("int8", stage.average_bits, sizes, tmp_path)
    assert stage.average_bits["bert.encoder.layer.0.attention.self.query"] == 8 + 32 / 32  # a scale for 32 inputs
    with pytest.raises(PostconditionError, match=r"should store 8\.000 bits a weight and stored"):
        check_bits("int8", dict.fromkeys(stage.average_bits, 8.0), sizes, tmp_path)


def test_a_weight_that_was_pruned_and_filled_in_is_found_out():
    model = tiny.bert()
    fit(model, Prune(sparsity=0.5))
    before = capture_state(model)
    next(iter(matrices(model).items()))[1].weight.data.fill_(0.1)
    fit(model, Int8())
    with pytest.raises(PostconditionError, match="`int8` filled in .* pruned weights of `bert.encoder.layer.0"):
        check_model("int8", Int8(), before, model)


@pytest.mark.parametrize("build", [tiny.bert, tiny.llama])
def test_what_a_pattern_names_stays_and_the_head_is_quantized_if_asked(build, tmp_path):
    model = build()
    names = list(matrices(model))
    stage = Int8(skip=("embeddings", names[0]))
    fit(model, stage)
    outside = ["bert.pooler.dense", "classifier"] if build is tiny.bert else ["score"]
    assert quantized(model) == [*names[1:], *outside] and not stage.keeps_head
    expected = logits(model.eval())
    stage.save(model, tmp_path)
    reloaded = plain(model).from_pretrained(tmp_path)
    assert quantized(reloaded) == quantized(model) and torch.equal(logits(reloaded), expected)


def test_bfloat16_weights_reload_exactly(tmp_path):
    model, stage = wide("llama", dtype=torch.bfloat16), Int8()
    fit(model, stage)
    expected = logits(model.eval())
    stage.save(model, tmp_path)
    assert torch.equal(logits(runtime.load(tmp_path, "multiclass")), expected)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "llama"])
def test_an_uneven_model_can_be_quantized_and_reloaded(name, tmp_path):
    model, stage = uneven(family(name)), Int8()
    fit(model, stage)
    expected = logits(model.eval())
    stage.save(model, tmp_path)
    assert torch.equal(logits(runtime.load(tmp_path, "multiclass")), expected)


def test_a_loaded_model_does_not_change_with_its_file(tmp_path):
    model, stage = tiny.bert(), Int8()
    fit(model, stage)
    expected = logits(model.eval())
    stage.save(model, tmp_path)
    loaded = runtime.load(tmp_path, "multiclass")
    weights = tmp_path / "model.safetensors"
    size = weights.stat().st_size
    with weights.open("r+b") as file:
        file.seek(size // 2)
        file.write(bytes(size - size // 2))
    assert torch.equal(logits(loaded), expected)


def test_after_training_in_anybodys_module_it_quantizes_what_was_trained():
    network, untrained = tiny.bert(), tiny.bert()
    tiny.trainer(Int8(), epochs=1).fit(tiny.Theirs(network), tiny.loader())
    fit(untrained, Int8())
    assert len(quantized(network)) == len(quantized(untrained)) == 12
    assert any(
        not torch.equal(layer.weight, untrained.get_submodule(name).weight) for name, layer in matrices(network).items()
    )


def test_a_format_without_its_library_is_reported(tmp_path, monkeypatch):
    model, stage = tiny.bert(), Int8()
    fit(model, stage)
    stage.save(model, tmp_path)
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="bitsandbytes format, which needs more packages: pip install bitsandbytes acc"):
        runtime.load(tmp_path, "multiclass")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
@pytest.mark.parametrize("technique", [Int8, NF4])
def test_it_runs_on_a_gpu(technique, tmp_path):
    model, stage = wide("bert"), technique()
    tiny.trainer(stage, accelerator="gpu").fit(tiny.Theirs(model), tiny.loader())
    stage.save(model, tmp_path)
    from compress.formats.bnb import move_model

    loaded = runtime.load(tmp_path, "multiclass")
    expected = logits(runtime.load(tmp_path, "multiclass"))
    move_model(loaded, torch.device("cuda"))
    with torch.no_grad():
        actual = loaded(**{key: tensor.cuda() for key, tensor in INPUTS.items()}).logits.cpu()
    assert torch.allclose(actual, expected, atol=0.02 * expected.abs().max().item())


@pytest.mark.parametrize("wrong", [{"threshold": -1.0}, {"threshold": "six"}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        Int8(**wrong)
    with pytest.raises(UserError, match=r"skip has the pattern `nothing`, which matches no layer"):
        Int8(skip=("embeddings", "head", "nothing")).check(tiny.bert(), [])
