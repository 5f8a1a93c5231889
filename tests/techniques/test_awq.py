import json
import re

import architectures
import pytest
import pytorch_lightning as pl
import tiny
import torch
from pydantic import ValidationError
from test_prune import fit
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import compress
from compress.errors import UserError
from compress.maths.rounding import Scheme, minmax_grid, round_to_grid
from compress.models.calibration import split_sections
from compress.models.folding import Fold, Norm, find_folds
from compress.models.layers import find_blocks
from compress.models.matrices import Matrix, find_zeros, matrices, measure_matrices
from compress.running.promises import capture_state, check_bits, check_model
from compress.runtimes.torch import load
from compress.techniques.awq import (
    AWQ,
    channel_scales,
    relative_magnitude,
    rescale_section,
    search_scales,
    take_rows,
)
from compress.techniques.prune import Prune

GROUPED = {**tiny.SHAPE, "num_key_value_heads": 2, "pad_token_id": 0}


def mistral():
    torch.manual_seed(0)
    return MistralForSequenceClassification(MistralConfig(**GROUPED, sliding_window=4, num_labels=3)).eval()


def qwen2_lm():
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**GROUPED)).eval()


def llama_with_biases():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**tiny.SHAPE, pad_token_id=0, attention_bias=True, mlp_bias=True)).eval()


REFUSED = ("xlnet", "deberta")
QUANTIZED = [name for name in architectures.ARCHITECTURES if name not in REFUSED]
DECODERS = (tiny.llama, tiny.llama_lm, mistral, qwen2_lm, llama_with_biases)


def awq(**settings):
    return AWQ(**{"group_size": 16, "grid": 6, "samples": 8, **settings})


def one(**settings):
    return {k: v for k, v in tiny.batch(**settings).items() if k != "labels"}


@torch.no_grad()
def logits(model, **settings):
    return model.eval()(**one(seed=9, **settings)).logits


@torch.no_grad()
def answer(model):
    return model.eval()(**architectures.inputs(9)).logits


def salient(build=tiny.llama_lm):
    """Return a model that computes the same function as that of ``build``, with activations 20 times as large in a few
    channels."""
    model = build()
    for block in find_blocks(model)[1]:
        for norm, layers in (
            (block.input_layernorm, (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)),
            (block.post_attention_layernorm, (block.mlp.gate_proj, block.mlp.up_proj)),
        ):
            norm.weight.data[[3, 20]] *= 20
            for layer in layers:
                layer.weight.data[:, [3, 20]] /= 20
    return model


def nearest(model, scheme):
    for matrix in matrices(model).values():
        weight = matrix.weight.clone()
        matrix.weight.copy_(round_to_grid(weight, minmax_grid(weight, scheme, torch.float32), scheme))
    return model


# The functions


def test_scales_worked_by_hand():
    activation, flat = torch.tensor([16.0, 1.0]), torch.ones(2)
    assert channel_scales(activation, flat, 0).tolist() == [1, 1]
    assert channel_scales(activation, flat, 0.5).tolist() == [2, 0.5]  # 4 and 1, around 1
    assert channel_scales(activation, flat, 1).tolist() == [4, 0.25]
    weight = torch.tensor([1 / 16, 1.0])
    assert channel_scales(activation, weight, 0.5).tolist() == [4, 0.25]  # 4 / (1 / 4) and 1
    assert channel_scales(activation, weight, 0).tolist() == [4, 0.25]  # 16 and 1: the weights alone
    # The second channel is never active, the third has no weight.
    assert channel_scales(torch.tensor([16.0, 0, 2, 1]), torch.tensor([1.0, 1, 0, 1]), 0.5).tolist() == [2, 1, 1, 0.5]
    assert channel_scales(torch.zeros(2), flat, 0.5).tolist() == [1, 1]


def test_weights_are_counted_as_shares_of_their_group():
    weight = torch.tensor([[1.0, -2.0, 0.0, 0.0], [4.0, 1.0, 3.0, 6.0]])
    assert relative_magnitude([weight], Scheme(4, 2)).tolist() == [0.75, 0.625, 0.25, 0.5]
    assert relative_magnitude([weight[:1], weight[1:]], Scheme(4, 2)).tolist() == [0.75, 0.625, 0.25, 0.5]


def test_some_rows_rank_scales_as_all_do(monkeypatch):
    torch.manual_seed(0)
    before, after = torch.nn.LayerNorm(32), torch.nn.Linear(32, 600)
    inputs = torch.randn(200, 32) * torch.logspace(0, 1.5, 32)
    fold = Fold(Norm("before", before), {"after": Matrix("after", after)}, torch.arange(32))
    moments = {"after": inputs.T @ inputs}
    assert len(take_rows(after.weight, 0.5)) == 300
    monkeypatch.setattr("compress.techniques.awq.MOST_ROWS", 600)
    every = search_scales(fold, moments, Scheme(3, 16), points=8)
    assert not torch.equal(every, torch.ones(32))
    monkeypatch.setattr("compress.techniques.awq.MOST_ROWS", 100)
    assert torch.equal(search_scales(fold, moments, Scheme(3, 16), points=8), every)


def test_channels_that_are_almost_never_active_get_no_scale_beyond_sixteen_bits():
    activation = torch.tensor([1.0] * 99 + [1e-30])
    for ratio in (0.5, 1.0):
        scale = channel_scales(activation, torch.ones(100), ratio)
        assert scale.min() > 1e-3 and scale.max() < 1e3 and (1 / scale).half().isfinite().all()


@pytest.mark.parametrize("build", DECODERS)
def test_the_scales_that_are_found_change_nothing_before_weights_are_rounded(build):
    model, before = salient(build), salient(build)
    for section in split_sections(model, [one(seed=seed) for seed in range(2)], matrices(model)):
        rescale_section(section, find_folds(section, {}), Scheme(3, 16, False), 6)
    assert torch.allclose(logits(model), logits(before), atol=1e-5)
    for i, block in enumerate(find_blocks(model)[1]):
        at = {
            norm: getattr(block, norm).weight / getattr(find_blocks(before)[1][i], norm).weight
            for norm in ("input_layernorm", "post_attention_layernorm")
        }
        for ratio in at.values():
            assert ratio[[3, 20]].max() < 0.5 * ratio.median(), "the large channels should have been scaled down"


# The stage


@pytest.mark.parametrize(("bits", "clip"), [(3, True), (4, False)])
def test_it_beats_rounding_to_nearest_where_a_few_channels_are_large(bits, clip):
    expected, stage = logits(salient()), awq(bits=bits, clip=clip)

    def error(model):
        return (logits(model) - expected).pow(2).mean()

    quantized = salient()
    fit(quantized, stage)
    assert error(quantized) < 0.6 * error(nearest(salient(), stage.scheme))


def test_clipping_helps_on_top():
    expected = logits(salient())
    errors = []
    for clip in (True, False):
        model = salient()
        fit(model, awq(bits=2, clip=clip))
        errors.append((logits(model) - expected).pow(2).mean())
    assert errors[0] < errors[1]


def test_padding_counts_for_nothing():
    def quantized(pad):
        model = salient()
        loader = tiny.loader()
        for batch in loader.dataset:
            batch["input_ids"][batch["attention_mask"] == 0] = pad
        tiny.trainer(awq(bits=3)).fit(tiny.Theirs(model), loader)
        return model.state_dict()

    first, second = quantized(7), quantized(41)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("build", "symmetric", "group_size"),
    [
        (tiny.llama, True, -1),
        (tiny.llama_lm, False, -1),
        (mistral, True, 16),
        (qwen2_lm, False, 16),
        (llama_with_biases, True, 16),
    ],
)
def test_it_keeps_head_and_zeros_and_reloads_to_the_same_logits_without_us(build, symmetric, group_size, tmp_path):
    model = build()
    causal = hasattr(model, "lm_head")
    head = (model.lm_head if causal else model.score).weight.clone()
    fit(model, Prune(sparsity=0.4))
    before, masks = capture_state(model), find_zeros(model)
    sizes = {name: matrix.size for name, matrix in matrices(model).items()}
    stage = awq(group_size=group_size, symmetric=symmetric)
    fit(model, stage)
    check_model("awq", stage, before, model)
    assert masks and all((model.get_submodule(name).weight[mask] == 0).all() for name, mask in masks.items())
    expected = logits(model)
    sizes = measure_matrices(model)
    stage.save(model, tmp_path)
    auto = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    reloaded = auto.from_pretrained(tmp_path)
    assert torch.allclose(logits(reloaded), expected, atol=1e-6)
    assert torch.equal((reloaded.lm_head if causal else reloaded.score).weight, head)
    described = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert described["config_groups"]["group_0"]["weights"]["num_bits"] == 4
    check_bits("awq", stage.average_bits, sizes, tmp_path)


def test_bfloat16_weights_reload_exactly(tmp_path):
    model = salient(tiny.llama).bfloat16()
    model.model.rotary_emb = tiny.llama().model.rotary_emb  # computes in float32; bfloat16() changed it too
    stage = awq()
    fit(model, stage)
    expected = logits(model)
    stage.save(model, tmp_path)
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype="auto")), expected)


@pytest.mark.parametrize("skipped", ["q_proj", "v_proj", "up_proj", "down_proj"])
def test_what_a_pattern_names_stays_bit_for_bit(skipped):
    model, before = salient(tiny.llama), salient(tiny.llama)
    fit(model, awq(skip=("embeddings", "head", f"*.{skipped}")))
    for name, layer in matrices(model).items():
        assert torch.equal(layer.weight, before.get_submodule(name).weight) == name.endswith(skipped), name


def test_the_head_is_quantized_if_asked(tmp_path):
    model = tiny.llama()
    stage = awq(skip=("embeddings",))
    fit(model, stage)
    assert "score" in stage.quantized
    expected = logits(model)
    stage.save(model, tmp_path)
    assert torch.allclose(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path)), expected, atol=1e-6)


def test_after_training_it_quantizes_what_was_trained():
    model, untrained = tiny.llama(), tiny.llama()
    fit(untrained, awq())
    fit(model, awq(), epochs=1)
    name, layer = next(iter(matrices(model).items()))
    assert not torch.equal(layer.weight, untrained.get_submodule(name).weight)
    for row in layer.weight.view(32, 2, 16).flatten(0, 1):
        assert len(row.unique()) <= 16


@pytest.mark.parametrize("name", QUANTIZED)
def test_every_architecture_that_its_format_stores_is_quantized_and_reloads(name, tmp_path):
    decoder = architectures.ARCHITECTURES[name].decoder
    model, nothing = architectures.build(name, lm=decoder), architectures.build(name, lm=decoder)
    stage = awq(samples=4)
    tiny.trainer(stage).fit(tiny.Theirs(model), architectures.loader(1))
    expected, before = (answer(each) for each in (model, nothing))
    assert not torch.equal(expected, before) and stage.quantized.keys() == matrices(model).keys()
    assert re.match(rf"[1-9]\d* of {len(stage.quantized)} matrices have scaled inputs", stage.limits)
    stage.save(model, tmp_path)
    again = load(tmp_path, "lm" if decoder else "multiclass")
    model_of_floats = architectures.build(name, lm=decoder)  # the loaded Gemma 2 caps its attention scores
    again.set_attn_implementation(model_of_floats.config._attn_implementation)
    assert torch.allclose(answer(again), expected, atol=1e-5 * expected.abs().max())


def test_in_a_script_of_ones_own_it_refuses_before_it_trains():
    class Trained(pl.Callback):
        def on_train_start(self, *args):
            pytest.fail("trained a model that cannot be quantized")

    with pytest.raises(UserError, match="group_size is 48"):
        tiny.trainer(awq(group_size=48), Trained(), epochs=1).fit(tiny.Theirs(tiny.bert()), tiny.loader())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
def test_it_works_on_a_gpu():
    model = salient()
    tiny.trainer(awq(), accelerator="gpu").fit(tiny.Theirs(model), tiny.loader())
    assert (logits(model) - logits(salient())).abs().max() < 0.1


def test_a_run_prunes_quantizes_and_keeps_its_promises(carry_out, tmp_path):
    none, both = carry_out("technique=prune+awq", "technique.awq.samples=16", model="tiny_llama").measurements.values()
    assert both.size_bytes < 0.6 * none.size_bytes and both.nonzeros < none.nonzeros
    assert compress.load(tmp_path / "artifact").description.weights == "packed"


# Errors


@pytest.mark.parametrize("name", ["xlnet", "deberta"])
def test_a_family_without_a_place_for_scales_is_refused_before_anything_is_loaded(name):
    with torch.device("meta"):
        skeleton = architectures.build(name)
    with pytest.raises(UserError, match=f"no place of `{name}` allows that: .* Set technique=gptq"):
        awq().check(skeleton, [])


def test_a_model_where_the_proof_finds_no_place_is_refused():
    model = tiny.bert()
    for block in model.bert.encoder.layer:
        attention = block.attention.self  # values that are no linear function of their layer
        attention.value.register_forward_hook(lambda _, __, output: output.tanh())
    with pytest.raises(UserError, match="no place of `bert` allows that"):
        fit(model, awq())


def test_groups_and_skips_that_do_not_fit_are_reported_from_the_shapes_alone():
    with torch.device("meta"):
        skeleton = tiny.llama()
    awq().check(skeleton, [])
    with pytest.raises(
        UserError, match=r"technique.awq.group_size is 48, which does not divide the 32 inputs of `model"
    ):
        awq(group_size=48).check(skeleton, [])
    with pytest.raises(UserError, match=r"skip is \['head'\]; embeddings stay floats here. Add"):
        awq(skip=("head",)).check(skeleton, [])
    with pytest.raises(UserError, match=r"technique.awq.skip has the pattern `\*.fc1`, which matches no layer"):
        awq(skip=("embeddings", "*.fc1")).check(skeleton, [])


@pytest.mark.parametrize("wrong", [{"bits": 5}, {"grid": 1}, {"samples": 0}, {"group_size": -2}, {"clip": "often"}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        AWQ(**wrong)
