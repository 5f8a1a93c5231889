"""A model is seen as its matrices, whatever modules store them."""

import copy

import pytest
import tiny
import torch
from architectures import build, inputs
from torch import nn

from compress.errors import UserError
from compress.formats import gptq
from compress.models.layers import find_stacks
from compress.models.matrices import (
    apply_masks,
    count_block_weights,
    find_all_matrices,
    find_zeros,
    matrices,
    select_matrices,
)
from compress.techniques.prune import Prune


def share(model):
    return sum(matrix.size for matrix in matrices(model).values()) / count_block_weights(model)


@pytest.mark.parametrize("name", ["bert", "gpt2", "phi3", "falcon", "t5", "bart", "mixtral", "qwen3_moe", "albert"])
def test_what_is_written_to_a_matrix_the_model_computes_with(name):
    model = build(name)
    with torch.no_grad():
        before = model(**inputs()).logits
        for matrix in matrices(model).values():
            assert matrix.weight.shape == matrix.shape == (matrix.rows, matrix.inputs)
            assert matrix.bias is None or matrix.bias.shape == (matrix.rows,)
            kept = matrix.weight.clone()
            matrix.weight.zero_()
            changed = model(**inputs()).logits
            matrix.weight.copy_(kept)
            # (An expert that no token is routed to, or a key without a query, may change nothing.)
            assert not torch.equal(changed, before) or matrix.expert is not None or "attn" in matrix.name.lower()
        assert torch.equal(model(**inputs()).logits, before)


def test_a_conv1d_is_the_linear_layer_of_its_transposed_weights():
    model, x = build("gpt2"), torch.randn(5, 64)
    matrix = matrices(model)["transformer.h.0.mlp.c_fc"]
    assert torch.allclose(matrix.module(x), nn.functional.linear(x, matrix.weight, matrix.bias), atol=1e-5)


def test_the_matrices_of_experts_are_parts_of_one_parameter():
    model = build("mixtral")
    names = [name for name in matrices(model) if ".experts." in name and name.startswith("model.layers.0.")]
    assert len(names) == 2 * 4 and "model.layers.0.mlp.experts.3.down_proj" in names
    matrix = matrices(model)["model.layers.0.mlp.experts.3.down_proj"]
    assert torch.equal(matrix.weight, model.model.layers[0].mlp.experts.down_proj[3])


@pytest.mark.parametrize(
    ("name", "stacks"),
    [
        ("bert", ["bert.encoder.layer"]),
        ("albert", ["albert.encoder.albert_layer_groups"]),
        ("t5", ["transformer.encoder.block", "transformer.decoder.block"]),
        ("t5-short", ["transformer.encoder.block", "transformer.decoder.block"]),  # not the sub-layers of a block
        ("bart", ["model.encoder.layers", "model.decoder.layers"]),
    ],
)
def test_an_encoder_decoder_has_two_stacks_of_blocks(name, stacks):
    model = build(name)
    assert list(find_stacks(model)) == stacks
    assert {name.split(f"{stack}.")[0] for name in matrices(model) for stack in stacks if stack in name} == {""}


def test_half_of_an_encoder_decoder_is_half_of_both_stacks():
    model = build("bart")
    tiny.trainer(Prune(sparsity=0.5, scope="layer")).fit(tiny.Theirs(model), tiny.loader())
    zeros = {name: mask.float().mean().item() for name, mask in find_zeros(model).items()}
    assert set(zeros) == set(matrices(model))
    assert all(value == pytest.approx(0.5, abs=0.01) for value in zeros.values())


def test_half_of_a_mixture_of_experts_is_half_of_its_experts():
    model = build("mixtral")
    tiny.trainer(Prune(sparsity=0.5)).fit(tiny.Theirs(model), tiny.loader())
    weights = [matrix.weight for matrix in matrices(model).values()]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert zeros == pytest.approx(0.5 * sum(weight.numel() for weight in weights), rel=1e-3)


def test_masks_hold_the_zeros_of_transposed_and_stacked_matrices():
    for name in ("gpt2", "mixtral"):
        model = build(name)
        masks = {key: torch.rand(matrix.shape) > 0.5 for key, matrix in matrices(model).items()}
        apply_masks(matrices(model), masks)
        assert {key: mask.equal(~masks[key]) for key, mask in find_zeros(model).items()} == dict.fromkeys(masks, True)


def test_a_model_whose_attention_multiplies_plain_parameters_is_refused():
    model = build("xlnet")
    assert share(model) < 0.9
    with pytest.raises(UserError, match=r"`prune` compresses matrices, and only \d+% of the weights in the blocks"):
        select_matrices(model, ("embeddings", "head"), "technique.prune")


def test_a_format_refuses_what_it_cannot_store():
    with pytest.raises(UserError, match=r"knows those of Linear.* layers, and `.*experts.*` is in a MixtralExperts"):
        gptq.select_storable(build("mixtral"), ("embeddings", "head"), "technique.gptq")
    attention = gptq.select_storable(build("mixtral"), ("embeddings", "head", "*experts*"), "technique.gptq")
    assert len(attention) == 4 * 3  # query, key, value and output of three blocks: what the user asked for


def test_a_weight_of_two_modules_is_one_matrix():
    model = tiny.bert()
    first, second = model.bert.encoder.layer
    second.intermediate.dense.weight = first.intermediate.dense.weight
    names = [name for name in matrices(model) if "intermediate" in name]
    assert names == ["bert.encoder.layer.0.intermediate.dense"]


def test_an_output_layer_that_is_tied_to_the_embeddings_is_one_matrix_of_theirs():
    tied, untied = (build("llama", lm=True, tie_word_embeddings=tie) for tie in (True, False))
    assert "lm_head" not in find_all_matrices(tied, embeddings=True, head=True)
    assert "lm_head" in find_all_matrices(untied, embeddings=False, head=True)


def test_a_copy_of_a_model_has_matrices_of_its_own():
    model = tiny.bert()
    other = copy.deepcopy(model)
    next(iter(matrices(other).values())).weight.zero_()
    assert next(iter(matrices(model).values())).weight.any()
