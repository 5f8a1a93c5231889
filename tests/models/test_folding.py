"""Folded scales change the weights of a model and leave its outputs as they are; a proof finds where."""

import re

import pytest
import torch
from architectures import ARCHITECTURES, build, inputs

from compress.models.calibration import split_sections
from compress.models.folding import (
    Norm,
    Rows,
    find_folds,
    is_invariant,
    match_rows,
    max_magnitudes,
    propose_folds,
    smooth_model,
)
from compress.models.matrices import matrices

LLAMA = {"input_layernorm", "post_attention_layernorm", "self_attn.o_proj", "mlp.down_proj"}
GEMMA = {"input_layernorm", "pre_feedforward_layernorm", "self_attn.o_proj", "mlp.down_proj"}
MOE = {*(LLAMA - {"mlp.down_proj"}), *(f"mlp.experts.{expert}.down_proj" for expert in range(4))}
T5_ENCODER = {"layer.0.layer_norm", "layer.0.SelfAttention.o", "layer.1.layer_norm", "layer.1.DenseReluDense.wo"}
T5 = {
    *T5_ENCODER,
    *("layer.0.layer_norm", "layer.0.SelfAttention.o", "layer.1.layer_norm", "layer.1.EncDecAttention.o"),
    *("layer.2.layer_norm", "layer.2.DenseReluDense.wo"),
}
PLACES = {
    **{name: {"attention.output.dense"} for name in ("bert", "roberta", "xlm-roberta", "electra")},
    "distilbert": {"attention.out_lin"},
    "albert": {"albert_layers.0.attention.dense"},
    "mpnet": {"attention.attn.o"},
    "modernbert": {"attn_norm", "attn.Wo", "mlp_norm", "mlp.Wo"},
    "deberta": set(),
    **{name: {"attention.output.dense"} for name in ("deberta-v2", "deberta-v2-conv")},
    "xlnet": set(),
    "bart": {"self_attn.out_proj", "encoder_attn.out_proj"},
    **dict.fromkeys(["t5", "t5-short"], T5),
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "phi3", "granite"], LLAMA),
    **dict.fromkeys(["gemma2", "gemma3_text"], GEMMA),
    "olmo2": {"self_attn.o_proj", "mlp.down_proj"},
    "cohere": LLAMA - {"post_attention_layernorm"},
    "starcoder2": LLAMA - {"mlp.down_proj"},
    "gpt2": {"ln_1", "ln_2", "attn.c_proj"},
    "opt": {"self_attn_layer_norm", "final_layer_norm", "self_attn.out_proj", "fc2"},
    "gpt_neox": {"input_layernorm", "post_attention_layernorm", "attention.dense"},
    "bloom": {"input_layernorm", "post_attention_layernorm", "self_attention.dense"},
    "falcon": {"input_layernorm", "self_attention.dense"},
    "gptj": {"ln_1", "attn.out_proj"},
    "mixtral": MOE,
    "qwen3_moe": MOE,
}
BATCHES = [inputs(0), inputs(1)]


def read_sections(model, wanted=None, batches=BATCHES):
    return split_sections(model, batches, matrices(model) if wanted is None else wanted)


def name_places(folds):
    """Return the places of folds inside their blocks: a norm's, or that of the matrix after rows."""
    names = (fold.before.name if isinstance(fold.before, Norm) else next(iter(fold.after)) for fold in folds)
    return {re.sub(r"^.*?\.\d+\.", "", name) for name in names}


def find_all(model, outcomes, wanted=None):
    return [fold for section in read_sections(model, wanted) for fold in find_folds(section, outcomes)]


def copy_state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def is_equal(model, state):
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@torch.no_grad()
def answer(model):
    return model(**inputs(9)).logits


def assert_close(new, old):
    assert torch.allclose(new, old, rtol=1e-4, atol=1e-4 * old.abs().max())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scales_are_folded_wherever_the_model_then_computes_the_same(name):
    model = build(name, lm=ARCHITECTURES[name].decoder)
    expected, before = answer(model), copy_state(model)
    folds = find_all(model, {})
    assert is_equal(model, before), "the proof should restore the weights bit for bit"
    assert name_places(folds) == PLACES[name]
    for fold in folds:
        tensors = [tensor.clone() for tensor in fold.tensors]
        fold.apply((0.3 * torch.randn(fold.channels)).exp())
        assert not any(torch.equal(new, old) for new, old in zip(fold.tensors, tensors) if old.any())
    assert_close(answer(model), expected)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_neox", "phi3", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_proof_finds_the_same_in_half_precision(name, dtype):
    model = build(name, lm=True).to(dtype)
    assert name_places(find_all(model, {})) == PLACES[name]


def test_the_smallest_weights_in_float16_are_rounded_and_cost_no_fold():
    model = build("llama", lm=True).half()
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.data *= 1e-4  # below the least normal number
        layer.self_attn.o_proj.weight.data *= 1e3
    assert name_places(find_all(model, {})) == LLAMA


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_a_norm_that_adds_one_to_its_weight_is_told_from_a_plain_one(name):
    for hint in (0, 1):  # 0 says that the norms are plain, as Llama's are
        outcomes = dict.fromkeys(("model.layers.input_layernorm", "model.layers.pre_feedforward_layernorm"), hint)
        model = build(name, lm=True)
        folds = find_all(model, outcomes)
        norms = [fold.before for fold in folds if isinstance(fold.before, Norm)]
        assert len(norms) == 6 and all(norm.offset == 1 for norm in norms)
        assert set(outcomes.values()) == {0, 1}


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("gemma3_text", ".pre_feedforward_layernorm"),  # taken for a plain norm, the model would move by half
        ("bert", ".attention.output.LayerNorm"),  # its output is also the residual
        ("olmo2", ".post_attention_layernorm"),
        ("starcoder2", ".mlp.c_proj"),  # GELU lies between
        ("gpt_neox", ".attention.dense"),  # taken for rows of queries, then keys, then values
        ("llama", ".self_attn.o_proj"),  # keys taken for values
    ],
)
def test_a_wrong_proposal_moves_the_outputs_and_is_refused(name, place):
    section = next(read_sections(build(name, lm=ARCHITECTURES[name].decoder)))
    fold = propose_folds(section)[place][1 if name == "llama" else 0]
    run = section.forwards[0]
    assert not is_invariant(run, [run()], [fold])


def test_wrong_hints_cost_no_fold():
    model = build("llama", lm=True)
    wrong = {"model.layers.self_attn.o_proj": 1, "model.layers.mlp.down_proj": 1}  # keys, and the gate
    assert name_places(find_all(model, wrong)) == PLACES["llama"]
    assert set(wrong.values()) == {0}


def test_a_place_that_would_change_an_unwanted_matrix_is_left_out():
    model = build("llama", lm=True)
    wanted = {name: matrix for name, matrix in matrices(model).items() if not name.endswith(("v_proj", "down_proj"))}
    assert name_places(find_all(model, {}, wanted)) == {"post_attention_layernorm"}


def test_experts_that_no_text_chose_are_folded_like_the_others():
    model = build("mixtral", lm=True)
    token = [inputs(0, rows=1, length=1)]  # two of the four experts
    folds = [fold for section in read_sections(model, batches=token) for fold in find_folds(section, {})]
    assert name_places(folds) == MOE
    norm = next(fold for fold in folds if fold.before.name == "model.layers.0.post_attention_layernorm")
    assert sorted(norm.after) == [
        "model.layers.0.mlp.experts.0.gate_up_proj",
        "model.layers.0.mlp.experts.1.gate_up_proj",
        "model.layers.0.mlp.experts.2.gate_up_proj",
        "model.layers.0.mlp.experts.3.gate_up_proj",
        "model.layers.0.mlp.gate.weight",
    ]


def test_query_heads_read_the_values_of_their_group():
    model = build("llama", lm=True)
    fold = next(fold for fold in find_all(model, {}) if isinstance(fold.before, Rows) and fold.channels == 32)
    first, second = [*range(16)], [*range(16, 32)]
    assert fold.source.view(4, 16).tolist() == [first, first, second, second]


def test_orders_of_rows_worked_by_hand():
    def rows(*sizes):
        return [way[0].tolist() for way in match_rows(*sizes)]

    assert rows(4, 4, [2]) == [[0, 1, 2, 3]]
    assert rows(8, 4, []) == [[4, 5, 6, 7], [0, 1, 2, 3], [1, 3, 5, 7], [0, 2, 4, 6]]  # gate and up
    assert rows(12, 4, [2]) == [[8, 9, 10, 11], [4, 5, 10, 11]]  # two heads: in turn, or by the head
    assert rows(8, 4, [2])[4:] == [[6, 7]]  # two query heads, one head of keys and values
    (values, source) = match_rows(4, 8, [2])[0]
    assert values.tolist() == [0, 1, 2, 3] and source.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    assert match_rows(5, 4, [2]) == []


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "gpt2", "bert", "t5", "albert", "mixtral"])
def test_smoothing_moves_the_largest_activations_to_the_weights_and_changes_no_answer(name):
    model = build(name, lm=ARCHITECTURES[name].decoder)
    expected, before = answer(model), copy_state(model)
    folds = smooth_model(model, BATCHES, matrices(model), 0.5)
    assert folds and not is_equal(model, before)
    assert_close(answer(model), expected)


def test_smoothing_goes_by_the_largest_activations_of_all_batches():
    model, strength = build("llama", lm=True), 0.5
    norm, layers = model.model.layers[0].input_layernorm, model.model.layers[0].self_attn
    weights = [layer.weight.clone() for layer in (layers.q_proj, layers.k_proj, layers.v_proj)]
    seen, before = [], norm.weight.clone()
    hook = layers.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in BATCHES:
            model(**batch)
            seen[-1] = seen[-1][batch["attention_mask"].bool()]
    hook.remove()
    largest = torch.cat(seen).abs().amax(0)
    smooth_model(model, BATCHES, matrices(model), strength)
    expected = (largest / torch.cat(weights).abs().amax(0)).sqrt()
    assert torch.allclose(before / norm.weight, expected, rtol=1e-4)


def test_magnitude_is_the_largest_of_every_input():
    assert max_magnitudes(torch.tensor([[1.0, -5.0], [-2.0, 3.0]])).tolist() == [2, 5]
