"""Words are tagged and questions answered through whole chains: trained, cut, distilled, exported and measured."""

import pytest
from squad_rules import evaluate

import compress
from compress.measuring.predictions import Predictions
from compress.planning.plan import read_choice
from compress.tasks.splits import load_splits
from compress.tasks.task import Task

seqeval = pytest.importorskip("seqeval.metrics", reason="seqeval is not installed: pip install -e '.[dev]'")


def read_test_split(name, limit):
    return load_splits(Task(**{**read_choice("task", name), "limit": {"test": limit}})).test


def run_card(folder, monkeypatch):
    """Return the variables of the Python lines of a model card, which are run in its folder."""
    (_, code) = (folder / "README.md").read_text().split("```python\n")
    monkeypatch.chdir(folder)
    variables = {}
    exec(code.partition("```")[0], variables)
    return variables


def cut_and_distil(export, precision):
    return [
        f"technique=structured+distill+{export}",
        f"technique.{export}.precision={precision}",
        "technique.structured.target_ffn_size=384",
        "technique.structured.samples=32",
        "technique.distill.kept_logits=all",
        "technique.distill.hard_weight=0.5",
    ]


def check_outcome(outcome, metric):
    none, small = outcome.measurements.values()
    assert none.examples == small.examples == 128 and small.size_bytes < 0.5 * none.size_bytes
    assert small.comparison.metric == metric and 0 <= small.comparison.churn <= 1
    (agreement,) = outcome.agreements.values()
    assert agreement.label_agreement > 0.8
    return small.quality


def test_words_are_tagged_by_a_graph_of_eight_bits(carry_out, tmp_path, monkeypatch):
    outcome = carry_out(*cut_and_distil("onnx", "int8_dynamic"), "baseline.epochs=4", task="toy_tokens")
    quality = check_outcome(outcome, "entity_f1")
    stored = Predictions.load(tmp_path / "artifact" / "predictions.npz")
    test = read_test_split("toy_tokens", 128)
    true = [[stored.names[tag] for tag in row] for row in test["label"]]
    found = [[stored.names[int(tag)] for tag in row[: len(of), 0]] for row, of in zip(stored.outputs, true)]
    assert quality["entity_f1"] == pytest.approx(seqeval.f1_score(true, found)) and quality["entity_f1"] > 0.1
    assert quality["accuracy"] == pytest.approx(seqeval.accuracy_score(true, found))
    assert "pipeline_tag: token-classification" in (tmp_path / "artifact" / "README.md").read_text()
    card = run_card(tmp_path / "artifact", monkeypatch)
    assert len(card["tags"]) == card["logits"].shape[1]
    assert compress.load(tmp_path / "artifact").model.config.id2label[1] == "B-company"


def test_questions_are_answered_by_a_graph_of_eight_bits(carry_out, tmp_path, monkeypatch):
    outcome = carry_out(*cut_and_distil("openvino", "int8"), "technique.openvino.samples=32", task="toy_span")
    quality = check_outcome(outcome, "f1")
    stored = Predictions.load(tmp_path / "artifact" / "predictions.npz")
    test = read_test_split("toy_span", 128)
    places = stored.outputs[:, :2].astype(int)
    texts = ["" if begin < 0 else context[begin:end] for context, (begin, end) in zip(test["text_pair"], places)]
    exact, f1 = evaluate(texts, [label["text"] for label in test["label"]], version=2)
    assert quality == pytest.approx({"f1": f1, "exact_match": exact})
    assert "pipeline_tag: question-answering" in (tmp_path / "artifact" / "README.md").read_text()
    assert isinstance(run_card(tmp_path / "artifact", monkeypatch)["answer"], str)


@pytest.mark.parametrize("task", ["toy_tokens", "toy_span"])
def test_layers_are_pruned_one_by_one_and_artifacts_measured_again(carry_out, tmp_path, task):
    settings = ["technique.sensitivity.sparsities=[0.9]", "technique.sensitivity.samples=32"]
    outcome = carry_out("technique=sensitivity", *settings, task=task)
    (table,) = (tmp_path / "report").glob("*sensitivity/*.csv")
    assert len(table.read_text().splitlines()) > 6
    again = compress.measure(
        tmp_path / "artifact",
        output=tmp_path / "again",
        hardware={"latency": {"seconds": 0.05, "block_s": 0.01, "memory": False}},
    )
    (quality,) = [measured.quality for name, measured in outcome.measurements.items() if name != "none"]
    assert again.table[list(quality)].iloc[0].to_dict() == pytest.approx(quality)


@pytest.mark.parametrize(("task", "variable"), [("toy_tokens", "tags"), ("toy_span", "answer")])
def test_plain_transformers_runs_the_lines_of_a_card(carry_out, tmp_path, monkeypatch, task, variable):
    carry_out("technique=prune+gptq", task=task)
    card = run_card(tmp_path / "artifact", monkeypatch)
    assert type(card["model"]).__module__.startswith("transformers.") and variable in card
    assert "compress" not in card
