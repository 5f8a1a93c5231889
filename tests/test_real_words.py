"""Test what compression costs with real weights on labelled words and on questions."""

import pytest
from squad_rules import evaluate
from test_real import FULL_TEST

from compress.measuring.predictions import Predictions
from compress.planning.plan import read_choice
from compress.tasks.splits import load_splits
from compress.tasks.task import Task

pytestmark = pytest.mark.slow
EXPORT = ["technique=onnx", "technique.onnx.precision=int8_dynamic"]
RECOVERED = [
    "technique=structured+distill",
    "technique.structured.target_ffn_size=1024",
    "technique.structured.samples=64",
    "technique.distill.train.epochs=1",
]


@pytest.mark.parametrize("chain", [EXPORT, RECOVERED], ids=["onnx", "structured+distill"])
def test_minilm_finds_the_entities_of_wnut17(carry_out, shared_models, shared_data, tmp_path, chain):
    seqeval = pytest.importorskip("seqeval.metrics", reason="seqeval is not installed: pip install -e '.[dev]'")
    outcome = carry_out(
        *chain,
        f"model.path={shared_models('minilm-l6')}",
        f"task.path={shared_data('wnut17')}",
        *FULL_TEST,
        "task.limit.train=null",
        "baseline.epochs=2",
        model="minilm",
        task="wnut17",
    )
    none, small = outcome.measurements.values()
    assert none.examples == 1287 and none.quality["entity_f1"] > 0.2 and small.size_bytes < none.size_bytes
    assert small.quality["entity_f1"] > none.quality["entity_f1"] - 0.05
    stored = Predictions.load(tmp_path / "artifact" / "predictions.npz")
    words = (stored.labels[..., 0] >= 0).sum(1)
    true, found = (
        [[stored.names[int(tag)] if tag >= 0 else "O" for tag in row[:count, 0]] for row, count in zip(tags, words)]
        for tags in (stored.labels, stored.outputs)
    )
    assert small.quality["entity_f1"] == pytest.approx(seqeval.f1_score(true, found))


def test_minilm_answers_questions_of_xquad(carry_out, shared_models, shared_data, tmp_path):
    folder = shared_data("xquad")
    outcome = carry_out(
        *EXPORT,
        f"model.path={shared_models('minilm-l6')}",
        f"task.path={folder}",
        "task.max_length=160",
        "task.limit={train: 250, validation: 30, test: null}",
        "baseline.epochs=2",
        "baseline.batch_size=8",
        "baseline.learning_rate=3e-4",
        model="minilm",
        task="squad",
    )
    none, small = outcome.measurements.values()
    test = load_splits(Task(**{**read_choice("task", "squad"), "path": str(folder)})).test
    stored = Predictions.load(tmp_path / "artifact" / "predictions.npz")
    places = stored.outputs[:, :2].astype(int)
    texts = [context[begin:end] if begin >= 0 else "" for context, (begin, end) in zip(test["text_pair"], places)]
    exact, f1 = evaluate(texts, [label["text"] for label in test["label"]], version=1)
    assert small.quality == pytest.approx({"f1": f1, "exact_match": exact}) and small.size_bytes < none.size_bytes
    assert none.examples == len(test) > 200 and none.quality["f1"] > 0.05  # of 250 questions, and no other training
