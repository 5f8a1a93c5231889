import itertools
import random

import pytest

from compress.maths.budgets import choose_levels, interpolate, spread_levels


def test_the_levels_are_the_best_of_all_that_fit():
    draw = random.Random(0)
    for _ in range(20):
        losses = [sorted((draw.random() for _ in range(4)), reverse=True) for _ in range(4)]
        costs = [sorted(draw.uniform(-1, 1) for _ in range(4)) for _ in range(4)]
        budget = draw.uniform(sum(map(min, costs)), sum(map(max, costs)))
        fitting = [
            levels
            for levels in itertools.product(range(4), repeat=4)
            if sum(cost[level] for cost, level in zip(costs, levels)) <= budget
        ]
        best = min(sum(loss[level] for loss, level in zip(losses, levels)) for levels in fitting)
        chosen = choose_levels(losses, costs, budget)
        assert sum(cost[level] for cost, level in zip(costs, chosen)) <= budget + 1e-6
        assert sum(loss[level] for loss, level in zip(losses, chosen)) == pytest.approx(best, rel=1e-3)


def test_large_and_small_numbers_are_distinguished():
    assert choose_levels([[3e-9, 1e-9, 0.0]], [[1e6, 2e6, 3e6]], 2.5e6) == [1]
    assert choose_levels([[3e9, 1e9, 0.0]], [[1e-6, 2e-6, 3e-6]], 1.5e-6) == [0]


def test_a_budget_below_the_cheapest_levels_is_refused():
    with pytest.raises(ValueError, match="the cheapest levels cost 3, more than 2"):
        choose_levels([[1.0, 0.0], [1.0, 0.0]], [[1.0, 5.0], [2.0, 5.0]], 2.0)


def test_sizes_between_measured_ones_are_interpolated():
    table = {2: 1.0, 4: 3.0, 8: 4.0}
    assert [interpolate(table, size) for size in (1, 2, 3, 6, 8, 9)] == [1.0, 1.0, 2.0, 3.5, 4.0, 4.0]


@pytest.mark.parametrize(
    "most, count, multiple_of, levels",
    [(12, 4, 1, [1, 5, 8, 12]), (3, 9, 1, [1, 2, 3]), (1536, 3, 32, [32, 768, 1536]), (100, 2, 32, [32, 96, 100])],
)
def test_levels_are_spread_evenly_from_the_least_to_all(most, count, multiple_of, levels):
    assert spread_levels(most, count, multiple_of) == levels
