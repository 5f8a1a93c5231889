import pytest
import tiny
import torch

from compress.models.folding import FOLDS, find_sources, fold_scale


@pytest.mark.parametrize("place", FOLDS)
def test_any_scales_leave_the_function_as_it_is(place):
    model = tiny.llama()  # two query heads to every key and value head
    one = {key: value for key, value in tiny.batch().items() if key != "labels"}
    with torch.no_grad():
        expected = model(**one).logits
    for block in model.model.layers:
        before = block.get_submodule(place.before)
        layers = [block.get_submodule(name) for name in place.layers]
        old = [layer.weight.clone() for layer in layers]
        scale = torch.rand(before.weight.shape[0]) + 0.5
        fold_scale(before, layers, scale, find_sources(block, before, layers[0]))
        assert not any(torch.allclose(layer.weight, weight) for layer, weight in zip(layers, old))
    with torch.no_grad():
        assert torch.allclose(model(**one).logits, expected, atol=1e-6)


def test_query_heads_read_the_values_of_their_group():
    block = tiny.llama().model.layers[0]
    source = find_sources(block, block.self_attn.v_proj, block.self_attn.o_proj)
    assert source.view(4, 8).tolist() == [[*range(8)], [*range(8)], [*range(8, 16)], [*range(8, 16)]]
