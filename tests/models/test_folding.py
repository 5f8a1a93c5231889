"""Folded scales change the weights of a model and leave its outputs as they are."""

import pytest
import tiny
import torch
from test_shapes import family, logits

from compress.models.families import FAMILIES, LLAMA
from compress.models.folding import find_sources, fold_scale
from compress.models.layers import find_blocks
from compress.models.shapes import read_block


def check_fold(model, record, place):
    """Check that random scales change weights of every block and leave the model's outputs as they are."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # also biases, which are zero in a new model
    expected = logits(model)
    for block in find_blocks(model)[1]:
        before = block.get_submodule(place.before)
        layers = [block.get_submodule(name) for name in place.layers]
        old = [layer.weight.clone() for layer in layers]
        scale = torch.rand(before.weight.shape[0]) + 0.5
        fold_scale(before, layers, scale, find_sources(before, layers[0], read_block(block, record).head_size))
        assert not any(torch.allclose(layer.weight, weight) for layer, weight in zip(layers, old))
    assert torch.allclose(logits(model), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "place"), [(name, fold) for name, record in FAMILIES.items() for fold in record.folds]
)
def test_any_scales_leave_the_function_as_it_is(name, place):
    check_fold(family(name), FAMILIES[name], place)  # two query heads share a key and value head


def test_query_heads_read_the_values_of_their_group():
    block = tiny.llama().model.layers[0]
    source = find_sources(block.self_attn.v_proj, block.self_attn.o_proj, read_block(block, LLAMA).head_size)
    assert source.view(4, 8).tolist() == [[*range(8)], [*range(8)], [*range(8, 16)], [*range(8, 16)]]
