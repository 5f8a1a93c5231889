"""The simulation of `benchmarks/significance.py`, made small. It finds gross errors; the script finds fine ones."""

import importlib
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("metric", ["accuracy", "f1_macro", "matthews", "spearman", "perplexity"])
def test_p_values_and_intervals_of_models_whose_difference_is_known(metric, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    significance = importlib.import_module("significance")
    monkeypatch.setattr(significance, "ROWS", 10)
    (case,) = (case for case in significance.CASES if case.metric == metric)
    monkeypatch.setattr(significance, "LOSS", 0.12)
    monkeypatch.setattr("compress.maths.statistics.WORK", 400_000)
    found = significance.simulate(case, 200, families=2, trials=25, size=200_000)
    assert found.uniform > 0.001 and found.not_small > 0.001
    assert found.false_star < 0.5 and found.covered >= 0.8 and found.found == 1
