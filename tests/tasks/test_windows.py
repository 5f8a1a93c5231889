"""Perplexity as papers measure it: of a whole text, in windows that may overlap."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset

from compress.errors import UserError
from compress.measuring.measure import predict_split
from compress.tasks.kinds import KINDS
from compress.tasks.kinds.language import LanguageModel
from compress.tasks.sources import join_rows
from compress.tasks.splits import Splits, load_splits
from compress.tasks.task import Task
from compress.tasks.tokens import TaskData, cut_windows

METRICS = ("perplexity", "word_perplexity", "accuracy")
LINES = ["", " = Title = ", "", " a b c w1 ", " w2 x y z", "", " = Other = ", "", " a w3 b w4 c w5 " * 9, ""]
"""The lines of a file; the last one ends it."""


def make_task(**settings):
    return Task(
        **{"name": "t", "kind": "lm", "metrics": METRICS, "primary": "perplexity", "max_length": 16, **settings}
    )


def measure(task, model, rows, tokenizer):
    """Return the metrics of the test split as a measurement computes them."""
    split = Dataset.from_dict({"text": rows})
    data = TaskData(Splits(split, split, split, task), tokenizer, task.max_length, batch_size=3)
    bench = SimpleNamespace(
        artifact=SimpleNamespace(model=model), data=data, split="test", batched=data.in_batches("test")
    )
    return predict_split(bench, task, torch.device("cpu"))[0]


@torch.no_grad()
def loop(model, ids, length, stride):
    """Return the mean loss in windows of the text, as in Hugging Face's "Perplexity of fixed-length models"; a window's
    loss counts as often as it has tokens to predict."""
    total, count, previous = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + length, ids.shape[1])
        inputs = ids[:, begin:end]
        targets = inputs.clone()
        targets[:, : previous - begin] = -100
        predicted = int((targets[:, 1:] != -100).sum())
        if predicted:
            total += model(inputs, labels=targets).loss.item() * predicted
            count += predicted
        previous = end
        if end == ids.shape[1]:
            break
    return total / count


@pytest.mark.parametrize("stride", [None, 16, 5, 1])
def test_it_is_that_of_a_plain_loop_over_the_whole_text(stride):
    model, tokenizer = tiny.llama_lm(), tiny.tokenizer()
    rows = join_rows({"text": [f"{line}\n" if line.strip() else "" for line in LINES[:-1]]})["text"]
    text = "\n\n".join(f"{line}\n" if line.strip() else "" for line in LINES[:-1])
    assert "".join(rows) == text and all(row.strip() for row in rows)
    quality = measure(make_task(rows="joined", stride=stride), model, rows, tokenizer)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    loss = loop(model, ids, 16, stride or 16)
    assert quality["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    tokens = ids.shape[1] - (stride is None and ids.shape[1] % 16 == 1)
    assert quality["word_perplexity"] == pytest.approx(math.exp(loss * tokens / len(text.split())), rel=1e-5)


def test_a_file_and_the_hub_have_the_same_text(tmp_path):
    for name in ("train", "validation", "test"):
        (tmp_path / f"{name}.raw").write_text("\n".join(LINES))
    files = ({name: f"{name}.raw" for name in ("train", "validation", "test")},)
    split = load_splits(make_task(rows="joined", path=str(tmp_path), files=files)).test
    hub = [f"{line}\n" if line.strip() else "" for line in LINES[:-1]]
    assert "".join(split["text"]) == "\n\n".join(hub) and list(split["text"]) == join_rows({"text": hub})["text"]


def test_blocks_overlap_in_what_is_measured_and_not_in_training():
    rows = Dataset.from_dict({"text": ["a b c " * 30]})
    data = TaskData(Splits(rows, rows, rows, make_task(stride=4)), tiny.tokenizer(), 16)
    train, test = data.tokenised("train"), data.tokenised("test")
    count = sum(len(ids) for ids in train["input_ids"])
    assert len(train) == math.ceil(count / 16) and len(test) == 1 + math.ceil((count - 16) / 4)
    assert test["labels"][:2] == [0, 12] and "labels" not in train.column_names
    (batch,) = [data.collate([test[0], test[1]])]
    assert (batch["labels"] != -100).sum(1).tolist() == [16, 4]
    scored = sum((data.collate([row])["labels"] != -100).sum().item() for row in test)
    assert scored == count


@pytest.mark.parametrize("count", [0, 1])
def test_a_text_that_predicts_nothing_makes_no_window(count):
    assert len(cut_windows(np.arange(count), 16, 4)) == 0 and len(cut_windows(np.arange(2), 16, 4)) == 1


def test_a_limit_leaves_a_joined_text_whole(tmp_path):
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.txt").write_text("\n".join(f"{split} {number}" for number in range(40)))
    files = ({split: {"file": f"{split}.txt"} for split in ("train", "validation", "test")},)
    kept = load_splits(make_task(rows="joined", path=str(tmp_path), files=files, limit={"test": 6}), 0).test["text"]
    whole = load_splits(make_task(rows="joined", path=str(tmp_path), files=files), 0).test["text"]
    assert list(kept) == list(whole)[:6]


def test_without_the_split_a_token_counts_as_a_word():
    kind = LanguageModel()
    outputs, labels = kind.keep_answers(torch.randn(2, 4, 9), torch.tensor([[1, 2, 3, 4], [-100, -100, 5, -100]]))
    answers = kind.collect_answers(outputs.numpy(), labels.numpy(), None)
    assert outputs[:, 2].tolist() == [4, 1] and answers.outputs[:, 2].tolist() == [3, 1]
    assert "word_perplexity" not in KINDS["chat"].metrics


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"stride": 17}, r"task.stride is 17, and a block has 16 tokens, .* Set task.stride=16 or less"),
        ({"stride": 4, "kind": "multiclass"}, "task.stride is 4, and task `t` is multiclass"),
        ({"rows": "joined", "kind": "multiclass"}, "task.rows is joined, and task `t` is multiclass"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, reason):
    metrics = {"metrics": ("accuracy",), "primary": "accuracy"} if "kind" in settings else {}
    with pytest.raises(UserError, match=reason):
        make_task(**settings, **metrics)
