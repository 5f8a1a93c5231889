import copy
import time
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from test_nf4 import wide
from test_prune import fit

from compress.artifacts.artifact import Artifact, Description
from compress.errors import PostconditionError
from compress.measuring import measure
from compress.measuring.bench import Bench
from compress.measuring.generation import build_decoding_call, find_decoder
from compress.measuring.measure import count_parameters, predict_split
from compress.runtimes.timing import (
    PATIENCE,
    Latency,
    Others,
    Turns,
    estimate_speedup,
    read_throttled_seconds,
    summarise_times,
    time_block,
    time_in_turns,
)
from compress.tasks.kinds import KINDS
from compress.tasks.task import Task
from compress.techniques.int8 import Int8
from compress.techniques.nf4 import NF4
from compress.techniques.prune import Prune


def test_statistics_of_known_times():
    found = summarise_times([np.array([1.0, 2.0]), np.array([3.0, 4.0, 100.0])])
    assert (found.median_ms, found.mean_ms, found.repeats) == (3.0, 22.0, 5)
    assert found.p95_ms == pytest.approx(80.8) and found.p99_ms == pytest.approx(96.16)
    assert found.sd_ms == pytest.approx(np.std([1, 2, 3, 4, 100], ddof=1))
    assert (found.low_ms, found.high_ms) == (1.5, 4.0)  # one block twice, or the other


def test_a_speedup_is_the_ratio_of_neighbouring_blocks():
    # The machine slows down continuously; the variant is always twice as fast.
    baseline = [np.array([10.0, 11.0]) * slow for slow in (1, 2, 3, 4)]
    variant = [block / 2 for block in baseline]
    found = estimate_speedup(baseline, variant)
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))


def test_the_interval_of_a_speedup_is_students_of_the_logarithms():
    found = estimate_speedup([np.array([1.0])] * 3, [np.array([1.0]), np.array([2.0]), np.array([4.0])])
    assert found.value == pytest.approx(0.5)  # 1, 1/2, 1/4
    half = 4.3027 * np.log(2) / np.sqrt(3)
    assert (found.low, found.high) == pytest.approx((0.5 * np.exp(-half), 0.5 * np.exp(half)), rel=1e-4)


def test_calls_take_turns_in_whole_cycles(monkeypatch):
    monkeypatch.setattr(Others, "__call__", lambda self: 0.0)
    order = []
    calls = {name: lambda i, name=name: order.append((name, i)) for name in ("baseline", "variant")}
    blocks = time_in_turns(calls, Latency(seconds=0.004, block_s=0.001, warmup=1), cycle=3).blocks
    count = len(blocks["baseline"])
    assert count == len(blocks["variant"]) >= 4
    assert all(len(block) % 3 == 0 for block in blocks["variant"])
    warm = order[:6]
    assert warm == [(name, i) for name in ("baseline", "variant") for i in range(3)]
    turns = [name for previous, (name, _) in zip([("", 0), *order[6:]], order[6:]) if name != previous[0]]
    # Alternating orders: a disturbance of the machine favours neither call.
    assert turns == [("baseline", "variant")[i % 2] for i in range(count + 1)]


@pytest.mark.parametrize(("patience", "rounds", "others"), [(1e9, 4, 0.0125), (0, 4, 0.2)])
def test_rounds_that_others_disturb_are_repeated_while_there_is_time(monkeypatch, patience, rounds, others):
    shares = iter([0.5, 0.0, 0.3, 0.0, 0.0, 0.05])
    monkeypatch.setattr(Others, "__call__", lambda self: next(shares))
    monkeypatch.setattr("compress.runtimes.timing.PATIENCE", patience)
    turns = time_in_turns({"one": lambda i: None}, Latency(seconds=1e-9, block_s=1e-3, warmup=1), cycle=1)
    assert len(turns.blocks["one"]) == rounds and turns.others == pytest.approx(others)
    assert len(list(shares)) == (0 if patience else 2)


def test_the_load_of_others_is_a_share():
    assert 0 <= Others()() <= 1


def cpu(busy, idle):
    return SimpleNamespace(_asdict=lambda: {"user": busy, "system": 0.0, "idle": idle, "guest": busy})


def test_the_load_of_others_is_a_share_of_the_cpus_on_which_we_may_run(monkeypatch):
    """Of 64 CPUs this process may use two, of which another process takes one."""
    moments = iter([[cpu(0.0, 0.0)] * 64, [cpu(10.0, 0.0)] * 2 + [cpu(0.0, 10.0)] * 62])
    own = iter([SimpleNamespace(user=0.0, system=0.0), SimpleNamespace(user=9.0, system=1.0)])
    process = SimpleNamespace(cpu_affinity=lambda: [0, 1], cpu_times=lambda: next(own))
    monkeypatch.setattr("psutil.Process", lambda: process)
    monkeypatch.setattr("psutil.cpu_times", lambda percpu: next(moments))
    monkeypatch.setattr("compress.runtimes.timing.read_throttled_seconds", lambda: 0.0)
    assert Others()() == pytest.approx(0.5)


def test_load_on_other_cpus_and_a_limit_on_our_own(monkeypatch):
    """All but our two CPUs are busy; then the limit of a container stops us for 3 of 10 seconds."""
    moments = iter([[cpu(t, 0.0)] * 2 + [cpu(t, 0.0)] * 62 for t in (0.0, 10.0, 20.0)])
    own = iter([SimpleNamespace(user=t, system=0.0) for t in (0.0, 20.0, 40.0)])
    stopped = iter([1.0, 1.0, 4.0])
    process = SimpleNamespace(cpu_affinity=lambda: [0, 1], cpu_times=lambda: next(own))
    monkeypatch.setattr("psutil.Process", lambda: process)
    monkeypatch.setattr("psutil.cpu_times", lambda percpu: next(moments))
    monkeypatch.setattr("compress.runtimes.timing.read_throttled_seconds", lambda: next(stopped))
    others = Others()
    assert [others(), others()] == pytest.approx([0.0, 0.3])


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        ("0::/job/step\n", {"job/step": "nr_throttled 7\nthrottled_usec 1500000", "job": "throttled_usec 500000"}),
        ("4:memory:/job\n2:cpu,cpuacct:/job\n", {"cpu,cpuacct/job": "nr_throttled 7\nthrottled_time 2000000000"}),
    ],
)
def test_the_time_of_being_stopped_is_that_of_all_groups_above(groups, files, tmp_path):
    (tmp_path / "groups").write_text(groups)
    for folder, text in files.items():
        (tmp_path / "fs" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / folder / "cpu.stat").write_text(f"usage_usec 9\n{text}\n")
    assert read_throttled_seconds(tmp_path / "groups", tmp_path / "fs") == pytest.approx(2.0)
    assert read_throttled_seconds(tmp_path / "none", tmp_path / "fs") == 0.0


def answering(logits):
    """Return a bench of a model that gives these logits, in batches of two texts."""
    batches = [
        {
            "input_ids": torch.arange(i, i + 2)[:, None],
            "attention_mask": torch.ones(2, 1),
            "labels": torch.zeros(2, dtype=int),
        }
        for i in range(0, len(logits), 2)
    ]
    count = len(logits)
    splits, texts = SimpleNamespace(test=None), [("text",)] * count
    data = SimpleNamespace(
        splits=splits,
        in_order=lambda split: range(count),
        words=lambda split: texts,
        max_length=8,
        kind=KINDS["multiclass"],
    )
    description = Description("multiclass", "tiny", "toy")
    artifact = Artifact(lambda input_ids, **_: SimpleNamespace(logits=logits[input_ids[:, 0]]), None, description)
    texts = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]
    return Bench("folder", artifact, "test", batches, texts, data, [("text",)], {1: texts, 2: texts})


TASK = Task(name="t", kind="multiclass", metrics=("accuracy",), primary="accuracy", labels=("a", "b"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_output_that_is_not_finite_is_no_answer(value):
    logits = torch.tensor([[1.0, 0.0]] * 6)
    assert predict_split(answering(logits), TASK, torch.device("cpu"))[0] == {"accuracy": 1.0}
    logits[3, 0] = value
    with pytest.raises(PostconditionError, match="outputs for 1 of the 6 examples of the test split are not finite"):
        predict_split(answering(logits), TASK, torch.device("cpu"))


@pytest.mark.parametrize("disturbed", ["batches of 1", "batches of 2", "tokenizing"])
def test_a_disturbance_of_any_timing_is_reported(disturbed, monkeypatch):
    def time_quietly(calls, latency, cycle, label):
        return Turns({name: [np.ones(2)] * 4 for name in calls}, 0.3 if label == disturbed else 0.05)

    monkeypatch.setattr(measure, "time_in_turns", time_quietly)
    monkeypatch.setattr(measure, "measure_size_bytes", lambda folder: 1)
    monkeypatch.setattr(measure, "count_parameters", lambda model: (1, 1))
    monkeypatch.setattr(measure, "move_model", lambda model, device: None)
    bench = answering(torch.tensor([[1.0, 0.0]] * 6))
    latency = Latency(seconds=1e-3, block_s=1e-3, batch_sizes=(1, 2), memory=False)
    measurements, _ = measure.measure_artifacts({"none": bench, "same": bench}, TASK, latency, torch.device("cpu"))
    assert {(found.others, found.is_disturbed) for found in measurements.values()} == {(0.3, True)}


def test_slow_calls_are_timed_for_their_budget_and_no_longer():
    latency = Latency(seconds=0.001, block_s=0.001, warmup=50)
    calls = []
    blocks = time_in_turns({"slow": lambda i: calls.append(time.sleep(0.01))}, latency, cycle=1).blocks
    assert (
        len(calls) == 1 + 4 and len(blocks["slow"]) == 4
    )  # warm-up stops with the budget; four blocks are the minimum


class Clock:
    """A clock that advances only in calls, so that calls can be counted."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.mark.parametrize(("busy", "budgets"), [(0.0, 1), (0.5, PATIENCE)])
def test_the_budget_is_kept_and_on_a_disturbed_machine_three_times_as_much(monkeypatch, busy, budgets):
    clock, calls = Clock(), []
    monkeypatch.setattr("compress.runtimes.timing.time", clock)
    monkeypatch.setattr(Others, "__call__", lambda self: busy)
    latency = Latency(seconds=2.0, block_s=0.1, warmup=3)
    both = {name: lambda i, name=name: (calls.append(name), clock.sleep(0.01)) for name in ("baseline", "variant")}
    blocks = time_in_turns(both, latency, cycle=5).blocks
    warm, in_a_block, budget = 5, 10, budgets * 2.0 / 0.01
    for name in both:  # repeated rounds include their pauses of 40 ms
        assert budget / 1.5 - in_a_block <= calls.count(name) - warm <= budget + in_a_block
        assert sum(map(len, blocks[name])) == calls.count(name) - warm
    assert clock.now <= (2 * budgets * 2.0 + 0.1) * 1.5


def test_a_block_has_a_cycle_although_the_process_was_stopped_for_longer_than_the_block(monkeypatch):
    clock, calls = Clock(), []
    monkeypatch.setattr(clock, "perf_counter", lambda: clock.sleep(1.0) or clock.now)
    monkeypatch.setattr("compress.runtimes.timing.time", clock)
    assert time_block(calls.append, block_s=0.1, cycle=3).tolist() == [1000.0] * 3
    assert calls == [0, 1, 2]


def test_a_causal_model_generates_the_same_with_and_without_a_cache():
    model, text = tiny.llama_lm(), tiny.batch(rows=1, length=12, padded=False, lm=True)
    ids, mask = text["input_ids"], text["attention_mask"]
    step = find_decoder(model, {"input_ids": ids, "attention_mask": mask})
    seen = []

    def watched(new, mask, past):
        logits, past = step(new, mask, past)
        seen.append(logits[:, -1])
        return logits, past

    call = build_decoding_call(watched, ids, mask, 9, torch.device("cpu"))
    for i in (0, 1, 2, 0, 1, 2):
        call(i)
    with torch.inference_mode():
        expected = model(ids).logits[0, 8:11]
    assert torch.allclose(torch.cat(seen), expected.repeat(2, 1), atol=1e-5)


def test_other_runtimes_generate_if_their_model_returns_a_cache():
    class Kept:
        def __call__(self, input_ids, attention_mask, past=None):
            seen = [*(past or []), *input_ids[0].tolist()]
            assert len(seen) == attention_mask.shape[1]
            return SimpleNamespace(logits=torch.zeros(1, 1, 2), past=seen if self.keeps else None)

    text = {"input_ids": torch.arange(6)[None], "attention_mask": torch.ones(1, 6)}
    kept = Kept()
    kept.keeps = True
    logits, past = find_decoder(kept, text)(text["input_ids"][:, :4], text["attention_mask"][:, :4], None)
    assert past == [0, 1, 2, 3]
    kept.keeps = False
    assert find_decoder(kept, text) is None and find_decoder(SimpleNamespace(), text) is None


def test_the_loss_of_a_block_is_the_sum_of_its_tokens():
    last = [0.5, 0.5]  # predicts a token beyond the block; the first token is never predicted
    logits = torch.log(torch.tensor([[[0.5, 0.5], [0.9, 0.1], last], [[0.2, 0.8], [0.5, 0.5], last]]))
    outputs, count = KINDS["lm"].keep_answers(logits, torch.tensor([[1, 0, 0], [0, 1, -100]]))
    assert outputs[:, 0].tolist() == pytest.approx([-np.log(0.5 * 0.9), -np.log(0.8)], rel=1e-6)
    assert outputs[1, 1] == 1 and count.tolist() == [2, 1]


def test_packed_weights_count_as_the_floats_that_they_represent():
    model = wide("bert")
    fit(model, Prune(sparsity=0.5))
    parameters, nonzeros = count_parameters(model)
    assert parameters == sum(weight.numel() for weight in model.parameters()) > nonzeros
    for stage in (NF4(), Int8()):
        quantized = copy.deepcopy(model)
        fit(quantized, stage)
        found = count_parameters(quantized)
        assert found[0] == parameters and 0.9 * nonzeros < found[1] <= nonzeros  # some are rounded to zero
