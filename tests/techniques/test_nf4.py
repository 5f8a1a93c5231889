import copy
import json

import pytest
import tiny
import torch
from pydantic import ValidationError
from test_prune import fit
from test_shapes import logits
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from compress.errors import PostconditionError, UserError
from compress.models.matrices import Matrix, dequantize_weight, find_zeros, matrices, measure_matrices
from compress.models.shapes import record_shapes, remove_units
from compress.running.promises import capture_state, check_bits, check_model
from compress.runtimes import torch as runtime
from compress.techniques.nf4 import NF4, average_bits, make_4bit_layer
from compress.techniques.prune import Prune

MODELS = ["bert", "roberta", "distilbert", "llama", "llama_lm"]


def wide(name, width=64, dtype=torch.float32):
    """Return a random model of two blocks in shapes for 4-bit kernels; Llama has two groups of heads."""
    torch.manual_seed(0)
    sizes = {**tiny.SHAPE, "hidden_size": width, "intermediate_size": 128, "pad_token_id": 0, "num_labels": 3}
    if name == "distilbert":
        sizes["hidden_dim"] = sizes.pop("intermediate_size")
    if "llama" in name:
        sizes["num_key_value_heads"] = 2
    auto = AutoModelForCausalLM if name == "llama_lm" else AutoModelForSequenceClassification
    config = AutoConfig.for_model(name.removesuffix("_lm"), max_position_embeddings=42, **sizes)
    return auto.from_config(config, dtype=dtype).eval()


def plain(model):
    """Return the class that loads the model without our code."""
    return AutoModelForCausalLM if hasattr(model, "lm_head") else AutoModelForSequenceClassification


def quantized(model):
    return [name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_weight_that_is_one_of_the_sixteen_values_stays(quant_type):
    # Appendix E of arXiv:2305.14314, and the eight magnitudes of a 4-bit float with two exponent bits, over the largest
    sixteen = {
        "nf4": [-1.0, -0.6961928, -0.39491749, -0.18477343, 0.0, 0.0795803, 0.33791524, 1.0],
        "fp4": [-1.0, -0.66666667, -0.5, -0.33333333, 0.0, 0.16666667, 0.25, 1.0],
    }
    linear = torch.nn.Linear(32, 32)
    linear.weight.data = 0.7 * torch.tensor(sixteen[quant_type] * 4).repeat(32, 1)
    packed = make_4bit_layer(Matrix("", linear), quant_type, False, 32, torch.float32).weight
    assert packed.numel() == 32 * 32 / 2 and torch.allclose(dequantize_weight(packed), linear.weight, atol=1e-7)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 128])
def test_a_block_of_a_row_shares_a_scale(blocksize, quant_type):
    linear = torch.nn.Linear(128, 32)
    linear.weight.data[:, :blocksize] *= 1000
    packed = make_4bit_layer(Matrix("", linear), quant_type, False, blocksize, torch.float32).weight
    error = (dequantize_weight(packed) - linear.weight).abs()
    largest = linear.weight.abs().unflatten(1, (-1, blocksize)).amax(2)
    assert (error.unflatten(1, (-1, blocksize)).amax(2) <= 0.17 * largest).all()  # the widest gap is a third


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {}) for name in MODELS),
        ("bert", {"quant_type": "fp4", "double_quantization": False, "blocksize": 32}),
        ("llama", {"compute_dtype": "bfloat16"}),
        ("llama_lm", {"double_quantization": False, "compute_dtype": "float16"}),
    ],
)
def test_it_keeps_head_and_zeros_and_reloads_to_the_same_logits_without_us(name, settings, tmp_path):
    model = wide(name)
    kept = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    layers = list(matrices(model))
    fit(model, Prune(sparsity=0.4))
    masks = find_zeros(model)
    before = capture_state(model)
    stage = NF4(**settings)
    fit(model, stage)
    check_model("nf4", stage, before, model)
    assert quantized(model) == layers == list(masks)
    assert all((dequantize_weight(model.get_submodule(layer).weight)[mask] == 0).all() for layer, mask in masks.items())
    expected = logits(model.eval())  # on some CPUs this changes the weights
    stage.save(model, tmp_path)
    reloaded = plain(model).from_pretrained(tmp_path)
    assert quantized(reloaded) == layers
    assert all(
        torch.equal(dequantize_weight(reloaded.get_submodule(layer).weight) == 0, find_zeros(reloaded)[layer])
        for layer in layers
    )
    assert all(
        (dequantize_weight(reloaded.get_submodule(layer).weight)[mask] == 0).all() for layer, mask in masks.items()
    )
    outside = {key: tensor for key, tensor in reloaded.state_dict().items() if not key.startswith(tuple(layers))}
    assert any("score" in key or "classifier" in key or "lm_head" in key for key in outside)
    assert all(torch.equal(tensor, kept[key]) for key, tensor in outside.items())
    assert torch.equal(logits(reloaded), expected)
    assert torch.equal(logits(runtime.load(tmp_path, "lm" if name == "llama_lm" else "multiclass")), expected)


@pytest.mark.parametrize(("name", "blocksize"), [("bert", 32), ("distilbert", 64), ("llama", 32), ("llama_lm", 64)])
def test_its_logits_are_those_of_the_weights_that_it_stands_for(name, blocksize):
    model, stage = wide(name), NF4(blocksize=blocksize)
    reference, untouched = copy.deepcopy(model), logits(model)
    fit(model, stage)
    for layer, linear in matrices(reference).items():
        linear.weight.copy_(dequantize_weight(model.get_submodule(layer).weight))
    expected = logits(reference)
    error = (logits(model.eval()) - expected).norm()
    assert error < 0.02 * expected.norm()  # a CPU with bfloat16 instructions uses them
    assert 0 < (expected - untouched).norm() < 0.3 * untouched.norm()


@pytest.mark.parametrize(
    ("settings", "bits"),
    [
        ({"double_quantization": False}, 4 + 32 / 64),
        ({"double_quantization": False, "blocksize": 32}, 4 + 32 / 32),
        ({}, 4 + (64 * 8 + 32) / 64**2),  # scales of the layer's 64 blocks, and one scale for these scales
    ],
)
def test_as_many_bits_are_stored_as_asked(settings, bits, tmp_path):
    model, stage = wide("bert"), NF4(**settings)
    fit(model, stage)
    sizes = measure_matrices(model)
    stage.save(model, tmp_path)
    check_bits("nf4", stage.average_bits, sizes, tmp_path)
    assert stage.average_bits["bert.encoder.layer.0.attention.self.query"] == bits
    with pytest.raises(PostconditionError, match=r"should store 4\.000 bits a weight and stored"):
        check_bits("nf4", dict.fromkeys(stage.average_bits, 4.0), sizes, tmp_path)


def test_of_many_blocks_256_share_a_scale():
    assert average_bits(768 * 768, 64, double_quantization=True) == 4 + 8 / 64 + 32 / (64 * 256)


@pytest.mark.parametrize("stage", [NF4(), NF4(quant_type="fp4", blocksize=32)])
def test_a_weight_that_was_pruned_and_filled_in_is_found_out(stage):
    model = wide("bert")
    fit(model, Prune(sparsity=0.5))
    before = capture_state(model)
    next(iter(matrices(model).items()))[1].weight.data.fill_(0.1)
    fit(model, stage)
    with pytest.raises(PostconditionError, match="`nf4` filled in .* pruned weights of `bert.encoder.layer.0"):
        check_model("nf4", stage, before, model)


def test_shapes_that_the_kernels_do_not_take_are_reported_from_the_shapes_alone():
    with torch.device("meta"):
        bert, llama, fitting = tiny.bert(), tiny.llama(), wide("bert")
    with pytest.raises(UserError, match=r"layer.\*.attention.self.query` has 32 outputs and 32 inputs; .*blocksize=64"):
        NF4().check(bert, [])
    NF4(blocksize=32).check(bert, [])
    with pytest.raises(UserError, match=r"k_proj` has 16 outputs and 32 inputs") as error:
        NF4(blocksize=32).check(llama, [])
    advice = str(error.value).partition("technique.nf4.skip=[")[2].rstrip("].").split(",")
    assert len(advice) == 4  # embeddings, head, and two kinds of layers
    NF4(blocksize=32, skip=advice).check(llama, [])
    with pytest.raises(UserError, match=r"`classifier` has 3 outputs and 64 inputs"):
        NF4(skip=("embeddings",)).check(fitting, [])


def test_what_a_pattern_names_stays_though_its_name_ends_anothers(tmp_path):
    model = wide("distilbert")
    layers = list(matrices(model))
    stage = NF4(skip=("embeddings", "classifier", layers[0]))
    fit(model, stage)
    assert quantized(model) == [*layers[1:], "pre_classifier"] and not stage.keeps_head
    expected = logits(model.eval())
    stage.save(model, tmp_path)
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert quantized(reloaded) == quantized(model) and torch.equal(logits(reloaded), expected)
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert said == [layers[0], "^classifier$"]


def test_bfloat16_weights_reload_exactly_and_are_computed_in_their_own_dtype(tmp_path):
    model, stage = wide("llama", dtype=torch.bfloat16), NF4()
    fit(model, stage)
    expected = logits(model.eval())
    stage.save(model, tmp_path)
    assert torch.equal(logits(runtime.load(tmp_path, "multiclass")), expected)
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["dtype"] == said["quantization_config"]["bnb_4bit_compute_dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_an_uneven_model_can_be_quantized_and_reloaded(name, tmp_path):
    model, stage = wide(name, width=128), NF4(blocksize=32)
    groups = [[1, 0], [1, 1]] if name == "llama" else [[1, 0, 1, 1], [1, 1, 1, 1]]
    remove_units(
        model, [torch.tensor(row).bool() for row in groups], [torch.arange(128) < channels for channels in (64, 96)]
    )
    record_shapes(model)
    fit(model, stage)
    expected = logits(model.eval())
    stage.save(model, tmp_path)
    assert torch.equal(logits(runtime.load(tmp_path, "multiclass")), expected)


def test_after_training_in_anybodys_module_it_quantizes_what_was_trained():
    network, untrained = wide("bert"), wide("bert")
    tiny.trainer(NF4(), epochs=1).fit(tiny.Theirs(network), tiny.loader())
    fit(untrained, NF4())
    assert len(quantized(network)) == len(quantized(untrained)) == 12
    assert any(
        not torch.equal(layer.weight, untrained.get_submodule(name).weight) for name, layer in matrices(network).items()
    )


def test_weights_that_a_cpu_has_rearranged_are_not_misread():
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16, so a forward pass leaves the weights as they are")
    model = wide("bert")
    fit(model, NF4())
    logits(model.eval())
    with pytest.raises(ValueError, match="before the first forward pass"):
        find_zeros(model)


@pytest.mark.parametrize("wrong", [{"quant_type": "int4"}, {"blocksize": 48}, {"compute_dtype": "int8"}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        NF4(**wrong)
