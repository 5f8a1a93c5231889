import architectures
import pytest
import tiny
import torch

from compress.models.blocks import read_blocks
from compress.models.costs import count_macs, count_parameters, count_unit_macs
from compress.models.matrices import matrices
from compress.models.shapes import shape_blocks


def test_the_multiplications_of_bert_by_hand():
    model = tiny.bert()
    length, hidden, inner, layers, labels = 10, 32, 64, 2, 3
    text = {"input_ids": torch.arange(length)[None] + 5}
    projections = 4 * length * hidden * hidden  # query, key, value, output
    attention = 2 * length * length * hidden
    feed_forward = 2 * length * hidden * inner
    head = hidden * hidden + hidden * labels  # for a single token: the pooler and the classifier
    assert count_macs(model, text) == layers * (projections + attention + feed_forward) + head
    assert count_macs(lambda **batch: None, text) is None


@pytest.mark.parametrize("name", ["deberta-v2", "bart", "gpt2", "mixtral"])
def test_the_multiplications_of_other_architectures_include_those_of_all_matrices(name):
    model = architectures.build(name)
    # Two of four experts read a token.
    read = sum(matrix.size / (1 if matrix.expert is None else 2) for matrix in matrices(model).values())
    macs = count_macs(model, architectures.inputs(rows=1, length=8, padded=False))
    assert 8 * read <= macs < 1.6 * 8 * read
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "falcon", "albert"])
def test_a_model_without_units_costs_less_by_what_they_cost(name):
    model = architectures.build(name)
    text = architectures.inputs(rows=1, length=8, padded=False)
    before = count_parameters(model), count_unit_macs(model, text)
    each = read_blocks(model)
    groups, ffn = [block.groups for block in each], [block.ffn for block in each]
    shape_blocks(model, [block.group_size for block in each], [block.ffn - 3 for block in each])
    after = count_parameters(model), count_unit_macs(model, text)
    for costs, left in zip(before, after):
        heads = sum((count - 1) * cost for count, cost in zip(groups, costs.groups))
        channels = sum(3 * cost for cost in costs.ffn)
        assert heads > 0 and channels > 0 and ffn
        assert left.total == costs.total - heads - channels
