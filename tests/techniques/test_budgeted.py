import csv
import itertools

import architectures
import pytest
import tiny
import torch
from pydantic import ValidationError

from compress.errors import UserError
from compress.exporting import budget as budgets
from compress.exporting import latency
from compress.models.blocks import read_blocks
from compress.models.costs import count_macs, count_parameters
from compress.models.importance import score_by_fisher
from compress.runtimes.timing import Latency
from compress.technique import Training
from compress.techniques.finetune import FineTune
from compress.techniques.structured import Structured


def fit(model, stage):
    tiny.trainer(stage, epochs=0).fit(FineTune(model, training=Training()), tiny.loader())
    return model.eval()


def sizes(model):
    return [block.heads for block in read_blocks(model)], [block.ffn for block in read_blocks(model)]


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("importance", ["fisher", "loss"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_budget_of_parameters_is_met_and_used(name, importance):
    model = tiny.bert() if name == "bert" else tiny.llama()
    before, goal = count(model), 0.8
    fit(model, Structured(target={"parameters": goal}, importance=importance, samples=16))
    costs = count_parameters(model)
    largest = max(*costs.groups, *costs.ffn)
    assert goal * before - largest <= count(model) <= goal * before


def test_megabytes_and_counts_are_the_same_budget():
    models = [tiny.bert() for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    goal = int(0.8 * count(models[0]))
    for model, target in zip(
        models, ({"parameters": goal}, {"size_mb": 4 * goal / 1e6}, {"parameters": goal / count(models[0])})
    ):
        fit(model, Structured(target=target, importance="fisher", samples=16))
    assert sizes(models[0]) == sizes(models[1]) == sizes(models[2])


def test_a_budget_of_multiplications_counts_those_of_attention_too():
    model = tiny.bert()
    text = {"input_ids": torch.arange(8)[None] + 5}
    before = count_macs(model, text)
    fit(model, Structured(target={"macs": 0.6}, importance="fisher", samples=16))
    assert 0.5 * before < count_macs(model, text) < 0.65 * before


def test_steps_with_new_scores_end_at_the_same_budget():
    model = tiny.bert()
    before = count(model)
    fit(model, Structured(target={"parameters": 0.8}, importance="fisher", iterations=3, samples=16))
    assert 0.78 * before < count(model) <= 0.8 * before


class Machine:
    """Stands in for the clock: a model's time from its shape, in which heads and channels do not simply add up."""

    def __init__(self, monkeypatch):
        self.asked = []
        monkeypatch.setattr(budgets, "ShapeTimer", self.start)

    def start(self, model, texts, runtime):
        timer = object.__new__(latency.ShapeTimer)
        timer.model, timer.texts, timer.runtime, timer.whole = model, texts, runtime, None
        timer.compare = self.compare
        blocks = read_blocks(model)
        self.whole = {"heads": [block.heads for block in blocks], "ffn": [block.ffn for block in blocks]}
        timer.sizes = self.whole
        timer.measure_whole = lambda: 20.0
        return timer

    def compare(self, **changed):
        self.asked.append(changed)
        now = {**self.whole, **changed}
        heads, ffn = (sum(now[part]) / sum(self.whole[part]) for part in ("heads", "ffn"))
        return 0.1 + 0.4 * heads + 0.4 * ffn + 0.1 * (heads * ffn) ** 0.5


def test_a_budget_of_latency_is_met_as_measured_and_its_table_kept(monkeypatch, tmp_path):
    machine, model = Machine(monkeypatch), tiny.bert()
    stage = Structured(target={"latency": 0.6}, importance="fisher", samples=16, keep_in=tmp_path / "kept")
    fit(model, stage)
    heads, ffn = sizes(model)
    assert machine.compare(heads=heads, ffn=ffn) == pytest.approx(0.6, rel=0.05)
    stage.report(tmp_path)
    rows = list(csv.DictReader((tmp_path / "latency_table.csv").open()))
    assert rows[0]["part"] == "whole" and float(rows[0]["ms"]) == 20.0
    assert {row["part"] for row in rows[1:]} == {"heads", "ffn"}
    assert float(rows[-1]["share"]) == 1.0
    # The next budget finds the table.
    asked, again = len(machine.asked), tiny.bert()
    fit(again, Structured(target={"latency_ms": 16.0}, importance="fisher", samples=16, keep_in=tmp_path / "kept"))
    assert len(machine.asked) - asked <= budgets.TURNS
    heads, ffn = sizes(again)
    assert machine.compare(heads=heads, ffn=ffn) == pytest.approx(0.8, rel=0.05)


def test_a_latency_in_steps_goes_on_where_a_step_went_too_far(monkeypatch):
    """Measurements that differ by 2 % make a step meet the goal of the next."""
    machine, model = Machine(monkeypatch), tiny.bert()
    factors = itertools.cycle([0.98, 1.0, 1.02])
    measure = machine.compare
    machine.compare = lambda **changed: measure(**changed) * next(factors)
    fit(model, Structured(target={"latency": 0.9}, importance="fisher", samples=16, iterations=10))
    heads, ffn = sizes(model)
    assert measure(heads=heads, ffn=ffn) == pytest.approx(0.9, rel=0.07)


def test_a_latency_that_is_not_reached_is_an_error(monkeypatch):
    machine = Machine(monkeypatch)
    measure = machine.compare
    machine.compare = lambda **changed: measure(**changed) if len(changed) == 1 else max(0.75, measure(**changed))
    with pytest.raises(UserError, match=r"asks for 10 ms, and the closest of 5 shapes takes 1\d.*Set a higher value"):
        fit(tiny.bert(), Structured(target={"latency": 0.5}, importance="fisher", samples=16))


def test_a_block_that_is_larger_than_the_others_saves_all_that_only_it_can():
    table = latency.LatencyTable(100.0, {4: 1.0}, {64: 0.25, 1024: 1.0}, {"ffn": [64, 64, 64, 1024]})
    assert table.estimate_savings("ffn", [64, 1024]) == pytest.approx([75.0, 0.0])
    assert table.estimate_savings("ffn", [32, 64]) == pytest.approx([0.0, 0.0])


def test_what_an_earlier_stage_pruned_stays_zero():
    model = tiny.bert()
    for block in read_blocks(model):
        for layer in (block.attention_out, block.ffn_out):
            layer.weight.data[::2] = 0
    fit(model, Structured(target={"parameters": 0.9}, importance="fisher", samples=16, compensate=True))
    for block in read_blocks(model):
        assert (block.ffn_out.weight[::2] == 0).all() and (block.ffn_out.weight[1::2] != 0).all()


def test_texts_score_alike_alone_and_together_where_tokens_are_in_one_dimension():
    model = architectures.build("opt")
    batch = {**architectures.inputs(rows=4, length=8, padded=False), "labels": torch.tensor([0, 1, 0, 1])}
    together = score_by_fisher(model, [batch])
    alone = score_by_fisher(model, [{key: value[row : row + 1] for key, value in batch.items()} for row in range(4)])
    for part in together:
        torch.testing.assert_close(torch.cat(together[part]), torch.cat(alone[part]), rtol=1e-3, atol=1e-9)


def test_a_training_after_a_timed_cut_is_not_resumed():
    assert Structured(target={"macs": 0.5}).resumes and Structured(target_heads=2).resumes
    assert not Structured(target={"latency": 0.5}).resumes


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime", "openvino"])
def test_shapes_are_timed_on_the_runtime_that_is_named(runtime, monkeypatch):
    monkeypatch.setattr(latency, "TIMING", Latency(seconds=0.004, block_s=0.001, warmup=1))
    model = tiny.bert()
    texts = [
        {"input_ids": torch.arange(length)[None] + 5, "attention_mask": torch.ones(1, length).long()}
        for length in (3, 9)
    ]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    timer = latency.ShapeTimer(model, texts, runtime)
    table = timer.measure_table([2, 4], [64])
    assert table.heads[4] == table.ffn[64] == 1.0 and table.heads[2] > 0 and table.whole_ms > 0
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_what_stays_takes_over_for_what_goes():
    """The logits of a compensated model are closer to those before."""
    torch.manual_seed(0)
    start = tiny.bert()
    text = next(iter(tiny.loader()))
    text.pop("labels")
    whole, errors = start.eval()(**text).logits, {}
    for compensate in (False, True):
        model = tiny.bert()
        model.load_state_dict(start.state_dict())
        fit(model, Structured(target={"parameters": 0.7}, importance="fisher", samples=16, compensate=compensate))
        errors[compensate] = (model(**text).logits - whole).square().sum().item()
    assert errors[True] < 0.9 * errors[False]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"target": {}}, "sets nothing; exactly one of latency"),
        ({"target": {"macs": 0.5, "latency": 0.5}}, "sets latency, macs; exactly one"),
        ({"target": {"parameters": 1e9}}, "is at .* already. Set a lower value"),
        ({"target": {"size_mb": 0.01}}, "with the fewest heads and FFN channels the model is still at"),
        ({"target": {"macs": 0.5}, "order": "head-first"}, "target has no order. Set it to null"),
        ({"target": {"macs": 0.5}, "ffn_multiple_of": 128}, "ffn_multiple_of is 128, and a block has 64 FFN channels"),
        ({"target": {"macs": 0.5}, "target_heads": 2}, "has sizes and a budget. Set one of them"),
        ({"target": {"macs": 0.5}, "importance": "activation"}, "Set technique.structured.importance=fisher"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Structured(**settings).check(tiny.bert(), [])


def test_a_misspelt_budget_is_refused():
    with pytest.raises(ValidationError, match="Unexpected keyword argument"):
        Structured(target={"latencies": 0.5})
    with pytest.raises(ValidationError, match="Input should be 'torch', 'onnxruntime' or 'openvino'"):
        Structured(target={"latency": 0.5, "for": "llama_cpp"})


@pytest.mark.parametrize("name", ["mixtral", "t5"])
def test_blocks_without_one_ffn_each_have_no_budget(name):
    with pytest.raises(UserError, match="has experts, blocks without an FFN, or heads that all blocks share"):
        Structured(target={"parameters": 0.8}).check(architectures.build(name), [])
