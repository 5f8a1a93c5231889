import copy
import time

import numpy as np
import pytest
import torch
from test_nf4 import wide
from test_prune import fit

from compress.measure import Latency, count, repeat, speedup, spread, take_turns
from compress.techniques.int8 import Int8
from compress.techniques.nf4 import NF4
from compress.techniques.prune import Prune


def test_statistics_of_known_times():
    found = spread([np.array([1.0, 2.0]), np.array([3.0, 4.0, 100.0])])
    assert (found.median_ms, found.mean_ms, found.repeats) == (3.0, 22.0, 5)
    assert found.p95_ms == pytest.approx(80.8)


def test_a_speedup_is_the_ratio_of_neighbouring_blocks():
    # The machine gets slower all the time, the variant is always twice as fast.
    baseline = [np.array([10.0, 11.0]) * slow for slow in (1, 2, 3, 4)]
    variant = [block / 2 for block in baseline]
    found = speedup(baseline, variant)
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)


def test_calls_take_turns_in_whole_cycles():
    order = []
    calls = {name: lambda i, name=name: order.append((name, i)) for name in ("baseline", "variant")}
    blocks = take_turns(calls, Latency(seconds=0.004, block_s=0.001, warmup=1), cycle=3)
    count = len(blocks["baseline"])
    assert count == len(blocks["variant"]) >= 3
    assert all(len(block) % 3 == 0 for block in blocks["variant"])
    warm = order[:6]
    assert warm == [(name, i) for name in ("baseline", "variant") for i in range(3)]
    turns = [name for previous, (name, _) in zip([("", 0), *order[6:]], order[6:]) if name != previous[0]]
    assert turns == ["baseline", "variant"] * count


def test_slow_calls_are_timed_for_their_budget_and_no_longer():
    latency = Latency(seconds=0.001, block_s=0.001, warmup=50)
    calls = []
    blocks = take_turns({"slow": lambda i: calls.append(time.sleep(0.01))}, latency, cycle=1)
    assert len(calls) == 1 + 3 and len(blocks["slow"]) == 3  # warm-up stops with the budget, three blocks are the least


def test_a_throughput_batch_holds_no_padding():
    batch = repeat({"input_ids": torch.arange(5)[None], "attention_mask": torch.ones(1, 5)}, 4)
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3, 4]] * 4 and batch["attention_mask"].shape == (4, 5)


def test_packed_weights_count_as_what_they_stand_for():
    model = wide("bert")
    fit(model, Prune(sparsity=0.5))
    parameters, nonzeros = count(model)
    assert parameters == sum(weight.numel() for weight in model.parameters()) > nonzeros
    for stage in (NF4(), Int8()):
        quantized = copy.deepcopy(model)
        fit(quantized, stage)
        found = count(quantized)
        assert found[0] == parameters and 0.9 * nonzeros < found[1] <= nonzeros  # some are rounded to zero
