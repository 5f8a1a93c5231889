"""The mathematics of pruning, by hand and against an independent library."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from compress.maths import sparsity as maths
from compress.maths.hessian import second_moment
from compress.maths.sparsity import (
    gradual_schedule,
    iterative_schedule,
    kth_smallest,
    magnitude_score,
    mask_groups,
    mask_model,
    mask_rows,
    mask_tensor,
    random_score,
    wanda_score,
)

WEIGHT = torch.tensor(
    [[0.1, -0.9, 0.3, 0.7], [-0.2, 0.8, -0.4, 0.6], [0.5, 0.2, -0.1, 1.0], [0.3, -0.3, 0.9, 0.05]],
)
NORMS = torch.tensor([4.0, 1.0, 1.0, 0.25])  # squared: the first input is twice as large, the last half
GENERATOR = torch.Generator().manual_seed(0)


def rows_of(mask):
    return [row.nonzero().flatten().tolist() for row in mask]


def test_half_of_a_matrix_by_magnitude_worked_by_hand():
    assert rows_of(mask_tensor(magnitude_score(WEIGHT), 0.5)) == [[0, 2], [0], [1, 2], [0, 1, 3]]


def test_half_of_every_row_by_magnitude_worked_by_hand():
    assert rows_of(mask_rows(magnitude_score(WEIGHT), 0.5)) == [[0, 2], [0, 2], [1, 2], [0, 3]]


def test_wanda_worked_by_hand():
    scores = wanda_score(WEIGHT, NORMS)
    assert torch.allclose(scores[0], torch.tensor([0.2, 0.9, 0.3, 0.35]))
    assert rows_of(mask_rows(scores, 0.5)) == [[0, 2], [0, 3], [1, 2], [1, 3]]


def test_two_of_every_four():
    score = torch.tensor([[4.0, 1.0, 3.0, 2.0, 0.5, 0.6, 0.7, 0.8]])
    assert rows_of(mask_groups(score, 2, 4)) == [[1, 3, 4, 5]]


def test_sparsegpt_worked_by_hand():
    # H = [[2, 1], [1, 2]], undamped: H^-1 = [[2, -1], [-1, 2]] / 3. Pruning w_0 = 1 leaves w_1 to minimise
    # (w - 1, ...) H (...)^T, that is w_1 = 3 + 1 * H_01 / H_11 = 3.5.
    weight, hessian = torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    (found,) = maths.sparsegpt([weight], hessian, [0.5], damping=1e-7)
    assert torch.allclose(found, torch.tensor([[0.0, 3.5]]), atol=1e-4)


def test_sparsegpt_with_inputs_that_do_not_correlate_is_pruning_by_magnitude():
    hessian = torch.eye(4)
    expected = WEIGHT.masked_fill(mask_tensor(magnitude_score(WEIGHT), 0.5), 0)
    assert torch.allclose(maths.sparsegpt([WEIGHT], hessian, [0.5])[0], expected)


@pytest.mark.parametrize("pattern", [None, (2, 4), (2, 3)])
def test_sparsegpt_loses_less_than_the_same_count_by_magnitude_and_keeps_zeros(pattern):
    x = torch.randn(512, 96, generator=GENERATOR) @ torch.randn(96, 96, generator=GENERATOR)
    weight = torch.randn(32, 96, generator=GENERATOR)
    before = mask_tensor(torch.rand(32, 96, generator=GENERATOR), 0.1)
    weight[before] = 0
    fraction = pattern[0] / pattern[1] if pattern else 0.5
    (found,) = maths.sparsegpt([weight], second_moment(x), [pattern or fraction], block=32)
    score = magnitude_score(weight)
    mask = mask_groups(score, *pattern) if pattern else mask_tensor(score, fraction)

    def loss(other):
        return ((weight - other) @ x.T).square().sum()

    assert loss(found) < 0.75 * loss(weight.masked_fill(mask, 0))
    assert (found[before] == 0).all()
    if pattern:
        zeros = (found == 0).reshape(32, -1, pattern[1]).sum(-1)
        assert (zeros >= pattern[0]).all()
    else:
        assert (found == 0).float().mean() == fraction


def test_layers_are_ranked_together():
    scores = {"small": lambda: torch.tensor([1.0, 2.0]), "large": lambda: torch.tensor([10.0, 20.0])}
    pruned = dict(mask_model(scores, 0.5))
    assert pruned["small"].all() and not pruned["large"].any()


def test_ties_are_pruned_to_the_count_asked_for():
    assert mask_tensor(torch.ones(10), 0.3).sum() == 3


def test_a_score_that_is_stored_by_columns_has_the_same_mask():
    score = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 3.0]])
    assert rows_of(mask_tensor(score.T.contiguous().T, 1 / 3)) == rows_of(mask_tensor(score, 1 / 3)) == [[1], [0]]


SCORES = arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.integers(1, 40)),
    elements=st.sampled_from([-1.0, -0.0, 0.0, 0.5, 1.0, 2.0, float("inf")]) | st.floats(-1, 1, width=32),
)


def lowest(row, count):
    """Return which of a row's values the ``count`` lowest are, ties in order."""
    chosen = sorted(range(len(row)), key=lambda i: (row[i], i))[:count]
    return [i in chosen for i in range(len(row))]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(SCORES, st.floats(0, 1), st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_lowest_of_every_row_are_those_of_a_sort(scores, fraction, dtype):
    score = torch.from_numpy(scores).to(dtype)
    inputs = score.shape[1]
    mask = mask_rows(score, fraction)
    ends = [round(i * fraction * inputs) for i in range(len(score) + 1)]
    assert mask.tolist() == [lowest(row, ends[i + 1] - ends[i]) for i, row in enumerate(score.tolist())]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(SCORES, st.integers(1, 40), st.integers(0, 40))
def test_the_lowest_of_every_group_are_those_of_a_sort(scores, group, pruned):
    score = torch.from_numpy(scores).repeat(1, group)  # as many groups as inputs
    mask = mask_groups(score, pruned % group, group)
    groups = score.unflatten(1, (-1, group)).flatten(0, 1).tolist()
    assert mask.unflatten(1, (-1, group)).flatten(0, 1).tolist() == [lowest(row, pruned % group) for row in groups]


def test_rows_take_turns_in_rounding():
    mask = mask_rows(torch.rand(8, 10, generator=GENERATOR), 0.25)
    assert mask.sum() == 20 and set(mask.sum(1).tolist()) <= {2, 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_threshold_is_that_of_a_sort(dtype):
    scores = [torch.randn(50, 7).to(dtype), torch.rand(31).to(dtype), torch.zeros(3, dtype=dtype)]
    scores.append(torch.tensor([-torch.inf, -0.0], dtype=dtype))
    ordered = torch.cat([score.flatten().float() for score in scores]).sort().values
    for k in (1, 2, 3, 4, 100, len(ordered)):
        assert kth_smallest(lambda: scores, k)[0] == ordered[k - 1]


def test_random_scores_are_those_of_their_seed():
    assert torch.equal(random_score(WEIGHT, 1), random_score(WEIGHT, 1))
    assert not torch.equal(random_score(WEIGHT, 1), random_score(WEIGHT, 2))


def test_the_cubic_schedule_worked_by_hand():
    assert gradual_schedule(101, end=1.0, every=50) == {0: 0.0, 50: pytest.approx(1 - 0.5**3), 100: 1.0}
    assert (
        max(gradual_schedule(100, begin=0.2, end=0.7, every=10)) == 69 and min(gradual_schedule(100, begin=0.2)) == 20
    )


def test_iterative_rounds_are_of_equal_length():
    assert iterative_schedule(90, 3) == {0: pytest.approx(1 / 3), 30: pytest.approx(2 / 3), 60: 1.0}


class TestAgainstLlmCompressor:
    """On the same weights and calibration batches."""

    @pytest.fixture(scope="class")
    def layer(self):
        pytest.importorskip("llmcompressor", reason="pip install llmcompressor")
        torch.manual_seed(0)
        layer = torch.nn.Linear(256, 64, bias=False)
        batches = [torch.randn(4, 20, 256) @ torch.randn(256, 256) / 16 for _ in range(3)]
        return layer, batches

    @pytest.mark.parametrize("pattern", [(0, 0), (2, 4), (4, 8)])
    def test_wanda(self, layer, pattern):
        from llmcompressor.modifiers.pruning.wanda import wanda_sparsify as theirs

        layer, batches = layer
        norms, samples = theirs.make_empty_row_scalars(layer), 0
        for batch in batches:
            norms, samples = theirs.accumulate_row_scalars(batch, layer, norms, samples)
        expected = theirs.sparsify_weight(layer, {layer: norms}, 0.5, *pattern)
        score = wanda_score(layer.weight, sum(batch.reshape(-1, 256).square().sum(0) for batch in batches))
        mask = mask_groups(score, *pattern) if pattern[1] else mask_rows(score, 0.5)
        assert torch.equal(layer.weight.detach().masked_fill(mask, 0), expected)

    @pytest.mark.parametrize("pattern", [None, (2, 4), (4, 8)])
    def test_sparsegpt(self, layer, pattern):
        from llmcompressor.modifiers.pruning.sparsegpt import sgpt_sparsify as theirs

        layer, batches = layer
        sizes = sum(batch.square().flatten(0, -2).sum(0) for batch in batches)
        group = pattern[1] if pattern else 256  # theirs visits groups as they are, ours those of large inputs first
        order = torch.arange(256).view(-1, group)[sizes.view(-1, group).sum(1).argsort(descending=True)].flatten()
        batches = [batch[..., order] for batch in batches]
        hessian, samples = theirs.make_empty_hessian(layer), 0
        for batch in batches:
            hessian, samples = theirs.accumulate_hessian(batch, layer, hessian, samples)
        ours = sum(second_moment(batch.reshape(-1, 256)) for batch in batches)
        # Without a pattern it prunes one weight more than asked of every block of 128 inputs: asked for as many here.
        size = layer.weight.shape[0] * 128
        expected = theirs.sparsify_weight(
            layer, {layer: hessian}, 0.5, *(pattern or (0, 0)), block_size=128, dampening_frac=0.01,
            preserve_sparsity_mask=False,
        )[1]  # fmt: skip
        (found,) = maths.sparsegpt([layer.weight], ours, [pattern or 0.5 + 1 / size])
        assert torch.equal(found == 0, expected == 0)
        assert torch.allclose(found, expected, atol=1e-4)

    def test_magnitude(self, layer):
        from llmcompressor.modifiers.pruning.utils.pytorch import PruningMaskFactory
        from llmcompressor.modifiers.pruning.utils.pytorch.mask_factory import PruningMaskCreatorArgs

        layer, _ = layer
        score = magnitude_score(layer.weight)
        arguments = PruningMaskCreatorArgs(parameter=layer.weight, sparsity=0.5, scores=score)
        expected = PruningMaskFactory.create_mask_creator("unstructured")(arguments)
        assert torch.equal(mask_tensor(score, 0.5), ~expected)


def test_against_pytorch_magnitude_over_all_layers():
    from torch.nn.utils import prune

    layers = {"a": torch.nn.Linear(30, 20), "b": torch.nn.Linear(20, 10)}
    scores = {name: partial(magnitude_score, one.weight) for name, one in layers.items()}
    masks = dict(mask_model(scores, 0.4))
    prune.global_unstructured([(one, "weight") for one in layers.values()], prune.L1Unstructured, amount=0.4)
    assert all(torch.equal(masks[name], one.weight_mask == 0) for name, one in layers.items())


def test_against_pytorch_two_of_every_four():
    from torch.ao.pruning import WeightNormSparsifier

    layer = torch.nn.Sequential(torch.nn.Linear(32, 16))
    mask = mask_groups(magnitude_score(layer[0].weight), 2, 4)
    theirs = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    theirs.prepare(layer, [{"tensor_fqn": "0.weight"}])
    theirs.step()
    assert torch.equal(mask, layer[0].weight == 0)
