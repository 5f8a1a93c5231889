import json

import architectures
import pytest
import tiny
import torch
from pydantic import ValidationError
from test_prune import fit
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from compress.errors import UserError
from compress.models.matrices import find_zeros, matrices, measure_matrices
from compress.running.promises import capture_state, check_bits, check_model
from compress.runtimes.torch import load
from compress.techniques.prune import Prune
from compress.techniques.w8a8 import W8A8

DYNAMIC, STATIC, ASYMMETRIC = {}, {"dynamic": False}, {"dynamic": False, "symmetric": False}
DECODERS = (tiny.llama, tiny.llama_lm)
PROBE = {key: value for key, value in tiny.batch(seed=9).items() if key != "labels"}


@torch.no_grad()
def logits(model):
    return model.eval()(**PROBE).logits


def reloaded(build, folder):
    """Yield the model loaded by transformers alone, and by our own runtime."""
    auto = AutoModelForCausalLM if build is tiny.llama_lm else AutoModelForSequenceClassification
    theirs = auto.from_pretrained(folder, dtype="auto")
    for parameter in theirs.parameters():
        # The memory alignment decides the last bit of a sum, and this bit may decide a rounding.
        parameter.data = parameter.data.clone()
    return theirs, load(folder, "lm" if build is tiny.llama_lm else "multiclass")


@pytest.mark.parametrize(
    ("build", "how"),
    [
        *((tiny.bert, how) for how in (DYNAMIC, STATIC, ASYMMETRIC)),
        *((tiny.roberta, STATIC), (tiny.llama, DYNAMIC), (tiny.llama_lm, ASYMMETRIC)),
        *((build, {**how, "smoothing": 0.5}) for build, how in zip(DECODERS, (DYNAMIC, ASYMMETRIC))),
    ],
)
def test_activations_are_quantized_in_memory_as_when_loaded_and_zeros_and_head_are_kept(build, how, tmp_path):
    model = fit(build(), Prune(sparsity=0.4))
    masks, before = find_zeros(model), capture_state(model)
    stage = W8A8(samples=8, **how)
    fit(model, stage)
    check_model("w8a8", stage, before, model)
    assert masks and all((model.get_submodule(name).weight[mask] == 0).all() for name, mask in masks.items())
    expected = logits(model)
    hooks = [layer.module._forward_pre_hooks for layer in matrices(model).values()]
    kept = [dict(registered) for registered in hooks]
    for registered in hooks:
        registered.clear()
    assert not torch.equal(logits(model), expected)  # the rounded weights alone
    for registered, copied in zip(hooks, kept):
        registered.update(copied)
    stage.save(model, tmp_path)
    for again in reloaded(build, tmp_path):
        assert torch.equal(logits(again), expected)
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in build().parameters())
    described = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert described["format"] == "int-quantized"
    weights, inputs = (described["config_groups"]["group_0"][key] for key in ("weights", "input_activations"))
    assert (weights["num_bits"], weights["strategy"], weights["symmetric"]) == (8, "channel", True)
    stored = (inputs["num_bits"], inputs["strategy"], inputs["dynamic"], inputs["symmetric"])
    assert stored == (
        8,
        "token" if stage.dynamic else "tensor",
        stage.dynamic,
        how is not ASYMMETRIC and "symmetric" not in how,
    )


@pytest.mark.parametrize("how", [DYNAMIC, {**STATIC, "smoothing": 0.5}])
def test_experts_share_a_range_even_one_that_no_text_is_routed_to(how, tmp_path):
    model = architectures.build("mixtral")
    router = model.model.layers[0].mlp.gate
    router.register_forward_pre_hook(lambda layer, args: (args[0].abs(),))
    router.weight.data[2] = -10
    stage = W8A8(samples=8, **how)
    tiny.trainer(stage).fit(tiny.Theirs(model), architectures.loader(2))
    router._forward_pre_hooks.clear()
    experts = {name: layer for name, layer in stage.quantized.items() if ".experts." in name}
    assert len(experts) == 2 * 4 * 3
    if not stage.dynamic:
        scales = {name: layer.inputs.grid.scale.item() for name, layer in experts.items()}
        assert len(set(scales.values())) == 2 * 3 and min(scales.values()) > 1e-3
    batch = architectures.inputs()
    with torch.no_grad():
        expected = model(**batch).logits
        stage.save(model, tmp_path)
        assert torch.equal(load(tmp_path, "multiclass")(**batch).logits, expected)


@pytest.mark.parametrize("how", [DYNAMIC, STATIC, ASYMMETRIC])
@pytest.mark.parametrize("build", tiny.ALL)
def test_eight_bits_change_the_answers_little(build, how):
    model = build()
    before = logits(model)
    fit(model, W8A8(samples=16, percentile=100, **how))
    assert 0 < (logits(model) - before).abs().max() < 0.05 * before.abs().max()


def test_eight_bits_are_stored_and_scales(tmp_path):
    model = tiny.bert()
    stage = W8A8(dynamic=False, samples=8)
    fit(model, stage)
    sizes = measure_matrices(model)
    stage.save(model, tmp_path)
    assert stage.average_bits["bert.encoder.layer.0.attention.self.query"] == 8 + 32 / 32
    check_bits("w8a8", stage.average_bits, sizes, tmp_path)


@pytest.mark.parametrize("how", [DYNAMIC, ASYMMETRIC])
def test_bfloat16_reloads_exactly(how, tmp_path):
    model = tiny.llama().bfloat16()
    stage = W8A8(samples=8, smoothing=0.5, **how)
    fit(model, stage)
    expected = logits(model)
    quantized = {name: weight.clone() for name, weight in model.named_parameters()}
    stage.save(model, tmp_path)
    for again in reloaded(tiny.llama, tmp_path):
        # Sums in another order, which the processor decides, round to the number beside.
        assert torch.allclose(logits(again), expected, rtol=0, atol=2**-7 * expected.abs().max().item())
        weights = dict(again.named_parameters())
        assert all(torch.equal(weights[name], weight) for name, weight in quantized.items())


def test_layers_that_share_an_input_share_its_range():
    stage = W8A8(dynamic=False, samples=8)
    fit(tiny.bert(), stage)
    first = "bert.encoder.layer.0."
    query, key, value, out = (
        stage.quantized[first + name].inputs.grid.scale
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    )
    assert query == key == value != out


def test_a_lower_percentile_makes_ranges_narrower():
    wide, narrow = W8A8(dynamic=False, samples=8, percentile=100), W8A8(dynamic=False, samples=8, percentile=99)
    fit(tiny.bert(), wide)
    fit(tiny.bert(), narrow)
    for name, layer in wide.quantized.items():
        assert narrow.quantized[name].inputs.grid.scale < layer.inputs.grid.scale


def outliers(model):
    """Return a model with a few channels of large activations, which the weights compensate: SmoothQuant's purpose."""
    for block in model.model.layers:
        for norm, layers in (
            (block.input_layernorm, (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)),
            (block.post_attention_layernorm, (block.mlp.gate_proj, block.mlp.up_proj)),
        ):
            norm.weight.data[::11] *= 100
            for layer in layers:
                layer.weight.data[:, ::11] /= 100
    return model


@pytest.mark.parametrize("how", [DYNAMIC, STATIC])
def test_smoothing_saves_the_small_activations_beside_large_ones(how):
    exact = logits(tiny.llama_lm())

    def error(smoothing):
        model = fit(outliers(tiny.llama_lm()), W8A8(samples=16, smoothing=smoothing, **how))
        return (logits(model) - exact).square().mean().item()

    assert error(0.5) < 0.1 * error(None)


def test_what_a_pattern_names_stays_bit_for_bit(tmp_path):
    model, before = tiny.llama(), tiny.llama()
    stage = W8A8(samples=8, smoothing=0.5, skip=("embeddings", "head", "*down_proj", "model.layers.0.self_attn.q_proj"))
    fit(model, stage)
    for name in ("model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj", "model.layers.0.input_layernorm"):
        assert torch.equal(model.get_submodule(name).weight, before.get_submodule(name).weight)
    assert not torch.equal(model.model.layers[1].input_layernorm.weight, before.model.layers[1].input_layernorm.weight)
    expected = logits(model)
    stage.save(model, tmp_path)
    for again in reloaded(tiny.llama, tmp_path):
        assert torch.equal(logits(again), expected)


@pytest.mark.parametrize(("build", "how"), [(tiny.bert, STATIC), (tiny.llama_lm, DYNAMIC)])
def test_the_head_is_quantized_if_asked(build, how, tmp_path):
    model = build()
    stage = W8A8(samples=8, skip=("embeddings",), **how)
    assert not stage.keeps_head
    fit(model, stage)
    assert ("classifier" if build is tiny.bert else "lm_head") in stage.quantized
    expected = logits(model)
    stage.save(model, tmp_path)
    for again in reloaded(build, tmp_path):
        assert torch.equal(logits(again), expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"symmetric": False}, r"Set technique.w8a8.dynamic=false, or technique.w8a8.symmetric=true"),
        ({"dynamic": False, "samples": 0}, r"samples is 0; technique.w8a8.dynamic=false needs calibration. Set"),
        ({"smoothing": 0.5, "samples": 0}, r"samples is 0; technique.w8a8.smoothing needs calibration. Set"),
    ],
)
def test_settings_that_contradict_are_reported(wrong, message):
    with pytest.raises(UserError, match=message):
        W8A8(**wrong)


def test_without_calibration_no_samples_are_asked_for():
    assert W8A8(samples=0).train_samples == W8A8(samples=99).train_samples == 0
    assert W8A8(dynamic=False).train_samples == W8A8(smoothing=0.5).train_samples == 128
    fit(tiny.bert(), stage := W8A8(samples=0))
    assert stage.quantized


@pytest.mark.parametrize("wrong", [{"smoothing": 1.1}, {"percentile": 50}, {"samples": -1}, {"dynamic": "maybe"}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        W8A8(**wrong)


def xlnet():
    return architectures.build("xlnet")


@pytest.mark.parametrize(
    ("build", "settings", "message"),
    [
        (xlnet, {"smoothing": 0.5}, r"no place of `xlnet` allows that: .* Set technique.w8a8.smoothing=null"),
        (tiny.bert, {"skip": ["embeddings"]}, r"head of `bert` reads one vector a text.*Add `head`"),
        (tiny.bert, {"skip": ["head"]}, r"embeddings stay floats here"),
        (tiny.bert, {"skip": ["embeddings", "head", "*mlp*"]}, r"the pattern `\*mlp\*`, which matches no layer"),
    ],
)
def test_what_does_not_fit_the_model_is_reported_before_anything_is_loaded(build, settings, message):
    with torch.device("meta"):
        skeleton = build()
    with pytest.raises(UserError, match=message):
        W8A8(**settings).check(skeleton, [])


@pytest.mark.parametrize(
    "how",
    [
        {"weight_bits": 4, "activation_bits": 4, "group_size": 16, "rounding": "gptq"},
        {"weight_bits": 4, "dynamic": False, "rounding": "gptq"},
        {"activation_bits": 4},
    ],
)
def test_four_bits_are_stored_and_computed_as_when_loaded(how, tmp_path):
    model, sizes = tiny.llama_lm(), measure_matrices(tiny.llama_lm())
    stage = W8A8(samples=8, **how)
    fit(model, stage)
    expected = logits(model)
    bits = how.get("weight_bits", 8)
    for layer in matrices(model).values():
        groups = layer.weight.unflatten(1, (-1, how.get("group_size", layer.inputs)))
        assert all(len(group.unique()) <= 2**bits for group in groups.flatten(0, 1))
    stage.save(model, tmp_path)
    check_bits("w8a8", stage.average_bits, sizes, tmp_path)
    for again in reloaded(tiny.llama_lm, tmp_path):
        assert torch.allclose(logits(again), expected, atol=1e-6)


def test_compensated_weights_lose_less():
    expected = logits(tiny.llama_lm())

    def lost(rounding):
        model = tiny.llama_lm()
        fit(model, W8A8(weight_bits=4, group_size=16, rounding=rounding, samples=16))
        return (logits(model) - expected).square().mean()

    assert lost("gptq") < 0.9 * lost("nearest")


def test_four_bits_with_one_range_for_all_tokens_are_refused():
    with pytest.raises(UserError, match=r"w8a8.activation_bits is 4, .* too coarse. Set technique.w8a8.dynamic=true"):
        W8A8(activation_bits=4, dynamic=False)
    with pytest.raises(UserError, match=r"w8a8.rounding=gptq needs calibration. Set technique.w8a8.samples=128"):
        W8A8(rounding="gptq", samples=0)


def test_it_works_alone_in_a_script_whose_module_is_not_ours():
    theirs = tiny.Theirs(tiny.bert())
    tiny.trainer(W8A8(dynamic=False, samples=8), epochs=1).fit(theirs, tiny.loader())
    for layer in matrices(theirs).values():
        assert all(len(row.unique()) <= 256 for row in layer.weight) and layer.module._forward_pre_hooks
    with pytest.raises(UserError, match="no place of `deberta` allows that"):
        tiny.trainer(W8A8(smoothing=0.5)).fit(tiny.Theirs(architectures.build("deberta")), tiny.loader())


def test_a_layer_that_reads_texts_and_tokens_in_one_dimension_has_no_scale_for_every_token():
    with torch.device("meta"):
        skeleton = architectures.build("opt", lm=True)
    with pytest.raises(UserError, match=r"w8a8.dynamic=true .* `model.decoder.layers.0.fc1` of `opt` .*dynamic=false"):
        W8A8().check(skeleton, [])
    W8A8(dynamic=False).check(skeleton, [])
