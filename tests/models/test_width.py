import copy
from dataclasses import replace

import architectures
import pytest
import torch
from architectures import ARCHITECTURES, build, inputs
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForTokenClassification,
)

from compress.errors import UserError
from compress.models.loading import choose_attention
from compress.models.narrowing import record_width
from compress.models.shapes import build_cut_class, record_shapes, shape_blocks
from compress.models.width import cut_width, find_spaces, prove_spaces
from compress.testing import make_embedding

REFUSED = {
    "bart": "two stacks of blocks",
    "t5": "two stacks of blocks",
    "t5-short": "two stacks of blocks",
    "xlnet": "does not reach its end",
    "deberta": "does not reach its end",
    "deberta-v2-conv": "what is added up has 3 and 64 dimensions",
}
QUICK = ("bert", "electra", "llama", "gpt2", "mixtral")
NAMES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ARCHITECTURES if name not in REFUSED
]


def is_lm(name):
    return ARCHITECTURES[name].decoder


@torch.no_grad()
def answer(model):
    return model.eval()(**inputs()).logits


def kill_dimensions(model, space, left):
    """Make the first ``left`` dimensions the only ones: nothing else is written, read, or seen by a norm."""
    for axis in space.axes:
        axis.stored.data.movedim(axis.dim, 0)[left:] = 0

    def compute_rest(norm, args, output):
        small = copy.deepcopy(norm)
        for parameter in small.parameters():
            parameter.data = parameter.data[:left]
        small.normalized_shape = (left,)
        small._forward_hooks.clear()
        return nn.functional.pad(small(args[0][..., :left]), (0, output.shape[-1] - left))

    for norm in space.norms.values():
        norm.register_forward_hook(compute_rest)


@pytest.mark.parametrize("name", NAMES)
def test_a_narrower_model_is_one_whose_other_dimensions_are_dead(name):
    model = build(name, is_lm(name))
    dead = copy.deepcopy(model)
    spaces = find_spaces(model)
    prove_spaces(model, spaces)
    assert {axis.size for space in spaces for axis in space.axes} == {64}
    for space in find_spaces(dead):
        kill_dimensions(dead, space, 40)
    expected = answer(dead)
    cut_width(model, 40)
    assert torch.allclose(answer(model), expected, atol=1e-5 * expected.abs().max())
    assert {axis.size for space in find_spaces(model) for axis in space.axes} == {40}


@pytest.mark.parametrize("name", NAMES)
def test_it_is_saved_and_reloads_bit_for_bit(name, tmp_path):
    model = build(name, is_lm(name))
    cut_width(model, 48)
    record_width(model)
    model.save_pretrained(tmp_path)
    auto = AutoModelForCausalLM if is_lm(name) else AutoModelForSequenceClassification
    plain = not hasattr(model.config, "compress")
    assert plain or model.config.compress == {"width": 48}
    base = auto if plain else build_cut_class(type(model))
    again = choose_attention(base.from_pretrained(tmp_path))
    assert type(again) is type(model) and torch.equal(answer(again), answer(model))


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_in_a_sentence_from_the_shapes_alone(name):
    with torch.device("meta"):
        skeleton = build(name)
    with pytest.raises(UserError, match=f"hidden states of `.*` cannot be made narrower: .*{REFUSED[name]}"):
        find_spaces(skeleton)


def test_a_model_whose_config_has_the_size_of_heads_is_plain_afterwards():
    model = build("qwen2", lm=True)
    cut_width(model, 48)
    record_width(model)
    assert model.config.hidden_size == 48 and model.config.head_dim == 16 and not hasattr(model.config, "compress")


def test_a_bert_is_plain_again_once_its_heads_fill_its_width(tmp_path):
    model = build("bert")
    shape_blocks(model, heads=[3, 3, 3])
    record_shapes(model)
    assert model.config.compress == {"heads": [3, 3, 3]}
    cut_width(model, 48)
    record_width(model)
    assert not hasattr(model.config, "compress")
    assert (model.config.hidden_size, model.config.num_attention_heads) == (48, 3)
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(AutoModelForSequenceClassification.from_pretrained(tmp_path)), answer(model))


def test_a_bert_of_two_cuts_has_both_in_its_entry_in_any_order():
    orders = []
    for first in ("width", "heads"):
        model = build("bert")
        for cut in (first, "heads" if first == "width" else "width"):
            if cut == "width":
                cut_width(model, 40)
                record_width(model)
            else:
                shape_blocks(model, heads=[2, 3, 4])
                record_shapes(model)
        orders.append((model.config.compress, answer(model)))
    assert orders[0][0] == orders[1][0] == {"heads": [2, 3, 4], "width": 40}
    assert torch.equal(orders[0][1], orders[1][1])


def test_a_narrower_model_is_one_to_start_from_with_another_head(tmp_path):
    model = BertForMaskedLM(build("bert").config).eval()
    (space,) = find_spaces(model)
    assert "cls.predictions.transform.LayerNorm" in space.norms  # what it computes meets the embeddings again
    prove_spaces(model, [space])
    cut_width(model, 40)
    record_width(model)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    tagger = build_cut_class(BertForTokenClassification).from_pretrained(tmp_path, config=config)
    assert tagger.classifier.in_features == 40 and answer(tagger).shape == (4, 16, 3)
    assert torch.equal(tagger.bert.embeddings.word_embeddings.weight, model.bert.embeddings.word_embeddings.weight)


def test_what_a_run_does_not_show_is_found_by_the_proof():
    model = build("bert")
    before = copy.deepcopy(model.state_dict())
    stream, head = find_spaces(model)
    without = [axis for axis in stream.axes if axis.module is not model.bert.encoder.layer[1].output.dense]
    with pytest.raises(UserError, match="because permuting them changes the logits by"):
        prove_spaces(model, [replace(stream, axes=without)])
    with pytest.raises(UserError, match="because permuting them changes the logits by"):
        prove_spaces(model, [replace(head, axes=head.axes[1:])])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_proof_in_half_precision_leaves_the_model_as_it_is():
    model = build("llama", lm=True).bfloat16()
    before = copy.deepcopy(model.state_dict())
    prove_spaces(model, find_spaces(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_answer_of_hidden_states_gets_narrower_too():
    model = make_embedding()
    (space,) = find_spaces(model)
    assert space.in_answer
    prove_spaces(model, [space])
    cut_width(model, 24)
    assert answer_of(model).shape == (4, 24)


def answer_of(model):
    with torch.no_grad():
        return model(**architectures.inputs(length=10)).logits


def test_shared_weights_are_cut_once():
    model = build("gpt2", lm=True)
    assert model.lm_head.weight is model.transformer.wte.weight
    cut_width(model, 32)
    assert model.lm_head.weight is model.transformer.wte.weight and model.lm_head.weight.shape == (60, 32)
    assert model.lm_head.in_features == model.transformer.wte.embedding_dim == 32
    assert model.transformer.h[0].attn.c_attn.nx == 32 and model.transformer.h[0].attn.c_proj.nf == 32
