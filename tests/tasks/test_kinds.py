"""A new kind of task is an object, and no other module knows of it."""

from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from test_tokens import WORDS, tokenizer  # noqa: F401

from compress.measuring.measure import predict_split
from compress.measuring.predictions import Predictions, compare_predictions
from compress.models.backbone import Backbone
from compress.tasks.kinds import KINDS, Metric, Regression, higher_is_better
from compress.tasks.metrics import TaskMetrics
from compress.tasks.splits import load_splits
from compress.tasks.task import Task
from compress.tasks.tokens import TaskData


class Stars(Regression):
    """A text has a number of stars."""

    name = "stars"
    metrics = MappingProxyType(
        {"error": Metric(lambda stars, labels, w: abs(stars.ravel() - labels) @ w / w.sum(0), higher_is_better=False)}
    )

    def is_missing(self, label):
        return "*" not in label

    def encode(self, task, labels, split):
        return [float(label.count("*")) for label in labels]


@pytest.fixture
def task(tmp_path, monkeypatch):
    monkeypatch.setitem(KINDS, "stars", Stars())
    for split, rows in {"train": 30, "validation": 20, "test": 40}.items():
        lines = [f"{' '.join(WORDS[: 1 + n % 5])}\t{'*' * (1 + n % 5) if n else '?'}" for n in range(rows)]
        (tmp_path / f"{split}.tsv").write_text("\n".join(["text\tlabel", *lines]))
    files = [{split: {"file": f"{split}.tsv"} for split in ("train", "validation", "test")}]
    return Task(name="t", kind="stars", metrics=("error",), primary="error", path=str(tmp_path), files=files)


def test_a_users_own_kind_is_read_scored_and_compared(task, tokenizer):  # noqa: F811
    splits = load_splits(task)
    assert splits.train["label"][:5] == [2.0, 3.0, 4.0, 5.0, 1.0] and "1 rows without a label" in splits.notes[0]
    data = TaskData(splits, tokenizer, max_length=16, batch_size=8)

    def count_words(input_ids, attention_mask, **_):
        return SimpleNamespace(logits=attention_mask.sum(1, keepdim=True).float() - 2)  # without the special tokens

    def count_one_word_less(**inputs):
        return SimpleNamespace(logits=count_words(**inputs).logits - 1)

    answers = {}
    for model in (count_words, count_one_word_less):
        scores = TaskMetrics(splits.task)
        for batch in data.test_dataloader():
            scores.update(model(**batch).logits, batch["labels"])
        bench = SimpleNamespace(
            artifact=SimpleNamespace(model=model), batched=data.test_dataloader(), data=data, split="test"
        )
        quality, answers[model] = predict_split(bench, splits.task, torch.device("cpu"))
        assert quality == {name: float(value) for name, value in scores.compute().items()}
        assert isinstance(answers[model], Predictions) and answers[model].labels[0] == 2.0

    change = compare_predictions(*answers.values(), "error")
    assert change.change.value == 1.0 and change.p_value < 0.01 and change.churn is None
    assert not higher_is_better("error")


def test_a_users_own_kind_says_what_head_it_needs(task):
    shape = {"model_type": "bert", "num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 9}
    model = Backbone("b", config=shape).skeleton(task)
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")
    assert type(model).__name__ == "BertForSequenceClassification"
