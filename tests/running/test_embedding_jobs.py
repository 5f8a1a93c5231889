"""Models that answer with vectors go through whole jobs."""

import re

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from test_conf import CONF
from test_retrieval import write_collection

import compress
from compress.errors import UserError
from compress.running.evaluate import evaluate_artifact

QUICK = [
    "task.limit={train: 64, validation: 16, test: 40}",
    "hardware.latency={seconds: 0.02, block_s: 0.01, memory: false}",
]


def measure_on(folder, tmp_path, *words):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("evaluate", [f"artifact={folder}", *QUICK[1:], *words])
    return evaluate_artifact(cfg, tmp_path / "again")


def test_a_narrower_student_learns_vectors_and_its_graph_retrieves(carry_out, tmp_path):
    student = [f"technique.distill.{word}" for word in ("student.hidden_size=64", "train.epochs=1", "kept_logits=all")]
    outcome = carry_out("technique=distill+onnx", *student, *QUICK, task="toy_embedding")
    none, both = outcome.measurements.values()
    assert none.examples == 40 and both.size_bytes < 0.5 * none.size_bytes
    assert set(both.quality) == {"spearman", "pearson", "spearman_dim32", "spearman_int8", "spearman_binary"}
    assert both.comparison.change.low <= both.comparison.change.value <= both.comparison.change.high

    # The lines on the card compute the vectors, without us.
    folder = tmp_path / "artifact"
    card = (folder / "README.md").read_text()
    assert "`[texts, 64]`; compare them by their cosines." in card and "256 bytes as floats, 64 as integers" in card
    (code,) = re.findall(r"```python\n(.+?)```", card, re.DOTALL)
    found = {}
    exec(code.replace('"."', f'"{folder}"').replace('"model.onnx"', f'"{folder}/model.onnx"'), found)
    model, tokenizer, _ = compress.load(folder)
    expected = model(**tokenizer("A text.", return_tensors="pt")).logits.numpy()
    assert found["logits"] == pytest.approx(expected, abs=1e-6) and np.linalg.norm(expected) == pytest.approx(1)

    # Trained on pairs, it retrieves.
    (data := tmp_path / "collection").mkdir()
    write_collection(data, test=[(f"q{i}", f"d{i}", 1) for i in range(6)])
    (row,) = measure_on(folder, tmp_path, "task=retrieval", f"task.path={data}")
    assert row["examples"] == 6 and 0 < row["value"] <= 1
    with pytest.raises(UserError, match="of the kind embedding; task `toy` is multiclass. Set task= to a task"):
        measure_on(folder, tmp_path, "task=toy")
    with pytest.raises(UserError, match="pooling is cls, and the exported graph was made with mean"):
        measure_on(folder, tmp_path, "task=retrieval", f"task.path={data}", "task.embedding.pooling=cls")


@pytest.mark.parametrize("task", ["retrieval", "rerank"])
def test_a_retriever_and_a_reranker_are_trained(carry_out, tmp_path, task):
    (data := tmp_path / "collection").mkdir()
    judged = [(f"q{i}", f"d{i}", 1) for i in range(6)]
    write_collection(data, train=judged[:4], dev=judged[4:5], test=judged[4:])
    outcome = carry_out("technique=none", "baseline.epochs=1", f"task.path={data}", *QUICK, task=task)
    (measured,) = outcome.measurements.values()
    assert measured.examples == 2 and 0 < measured.quality["mrr_10"] <= 1
    model, tokenizer, _ = compress.load(tmp_path / "artifact")
    with torch.inference_mode():
        logits = model(**tokenizer("w1", "w1 w2", return_tensors="pt")).logits
    assert logits.shape == (1, 128 if task == "retrieval" else 1)
