"""Collections are read from BEIR's layout and from questions, and rankings are judged."""

import json

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from compress.errors import UserError
from compress.maths.bm25 import rank_by_words
from compress.maths.vectors import JUDGEMENTS, judge_ranking, rank_documents
from compress.models.layers import detect_task_kind
from compress.tasks.kinds import KINDS
from compress.tasks.metrics import TaskMetrics
from compress.tasks.splits import load_splits
from compress.tasks.task import Task
from compress.tasks.tokens import TaskData
from compress.testing import make_embedding
from compress.tiny_models import SHAPE, make_batch, make_tokenizer

KIND = KINDS["retrieval"]
CORPUS = [{"_id": f"d{i}", "title": "" if i else "a", "text": f"w{i} w{i + 1}"} for i in range(6)]
QUERIES = [{"_id": f"q{i}", "text": f"w{i}"} for i in range(6)]


def write_collection(folder, corpus=CORPUS, queries=QUERIES, **judged):
    (folder / "qrels").mkdir()
    for name, rows in {"corpus": corpus, "queries": queries}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for split, rows in judged.items():
        lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row)) for row in rows)]
        (folder / f"qrels/{split}.tsv").write_text("\n".join(lines))


def make_task(folder, **settings):
    values = {"rows": "collection", "metrics": ("ndcg_10", "recall_1"), "primary": "ndcg_10", "holdout": {}}
    return Task(**{"name": "t", "kind": "retrieval", "path": str(folder), **values, **settings})


def test_a_collection_in_beirs_layout(tmp_path):
    train = [("q0", "d0", 1), ("q1", "d1", 2), ("q1", "d2", 1), ("q1", "d5", 0), ("q2", "d2", 1), ("q3", "d3", 0)]
    write_collection(tmp_path, train=train, test=[("q4", "d4", 1), ("q5", "d5", 1)])
    task = make_task(tmp_path, holdout={"validation": 1}, limit={"test": 1}, embedding={"negatives": 1})
    splits = load_splits(task)
    assert [len(rows) for rows in (splits.train, splits.validation, splits.test)] == [8, 7, 7]
    assert splits.train["text"][0] == "a w0 w1" and splits.test["shared"] == [True] * 6 + [False]
    assert splits.notes == (
        "train: 1 queries without a relevant document left out",
        "validation: 1 rows held out of train (task.holdout.validation)",
        "test: 1 of 2 rows (task.limit.test)",
    )
    # Training batches hold a query, its best document and a negative, which is the one that the data names.
    data = TaskData(splits, make_tokenizer(), max_length=8, batch_size=1)
    for batch in data.train_dataloader():
        (_, place, best), *documents = batch["labels"].tolist()
        assert place == 0 and len(documents) == 2 and documents[0][:2] == [best, 1]
        assert best != 1 or documents[1][0] == 5


def test_questions_become_a_collection(tmp_path):
    paragraphs = [{"context": f"w{i}", "qas": [{"question": f"w{i} a"}, {"question": f"w{i} b"}]} for i in range(3)]
    (tmp_path / "x.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    files = [{"train": "train.json", "test": "test.json"}, {"test": "*.json"}]
    splits = load_splits(make_task(tmp_path, rows="questions", files=files))
    assert [len(rows) for rows in (splits.train, splits.validation, splits.test)] == [3, 3, 9]
    assert splits.test[3]["label"] == [[0, 1]] and "the documents alone" in splits.notes[0]
    with pytest.raises(UserError, match="baseline.epochs is 1 and task `t` has no queries to train on"):
        KIND.check_training("t", splits.train, splits.validation, "baseline", 1)
    KIND.check_training("t", splits.train, splits.validation, "technique.distill.train", 1)
    with pytest.raises(UserError, match="has no validation queries to choose the best epoch by"):
        KIND.check_training("t", splits.train, splits.validation, "technique.distill.train", 2)


def test_a_table_of_questions_and_passages_becomes_a_collection(tmp_path):
    (tmp_path / "train.csv").write_text("q,p\nw1,a\nw1,b\nw2,b\nw3,c\nw4,c\n")
    task = make_task(
        tmp_path,
        rows="table",
        files=[{"train": "train.csv"}],
        columns={"text": "q", "text_pair": "p"},
        holdout={"validation": 1, "test": 1},
    )
    splits = load_splits(task)
    assert [len(rows) for rows in (splits.train, splits.validation, splits.test)] == [5, 4, 4]


def test_rankings_are_judged_as_by_trec_eval():
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed: pip install -e '.[dev]'")
    rng = np.random.default_rng(0)
    grades, found = rng.integers(0, 3, 30), rng.random(30)
    order = (-found).argsort()
    values = dict(zip(JUDGEMENTS, judge_ranking(grades[order].tolist(), grades[grades > 0].tolist())))
    assert values["ndcg_10"] == pytest.approx(sklearn.ndcg_score([grades], [found], k=10))
    assert values["mrr_10"] == 1 / (1 + (grades[order] > 0).argmax())
    assert values["recall_10"] == (grades[order][:10] > 0).sum() / (grades > 0).sum()


def test_documents_are_found_by_cosine_in_a_stored_form():
    documents = np.array([[1.0, 0.1], [0.1, 5.0], [1.0, 1.0]])
    assert rank_documents(np.array([[0.0, 1.0], [1.0, 0.0]]), documents, "float", 2).tolist() == [[1, 2], [0, 2]]
    assert rank_documents(np.array([[0.0, 1.0]]), documents, "binary", 1).tolist() == [[0]]  # all signs are equal


def test_bm25_by_hand():
    documents = ["the red fox", "the the dog", "a red red fox sleeps here"]
    assert rank_by_words(["Red fox!", "dog", "unknown"], documents, 2).tolist() == [[0, 2], [1, 0], [0, 1]]


def test_a_model_is_scored_over_all_documents_in_any_order(tmp_path):
    write_collection(tmp_path, test=[(f"q{i}", f"d{i}", 1) for i in range(6)])
    splits = load_splits(make_task(tmp_path))
    data = TaskData(splits, make_tokenizer(), max_length=8, batch_size=4)
    model, scores = make_embedding(), TaskMetrics(splits.task, splits.test)
    vectors = {}
    with torch.inference_mode():
        for batch in data.test_dataloader():
            logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
            scores.update(logits, batch["labels"])
            vectors |= {tuple(label[:2]): row for label, row in zip(batch["labels"].tolist(), logits)}
    hits = []
    for i in range(6):
        cosines = torch.stack([vectors[float(j), 1.0] @ vectors[float(i), 0.0] for j in range(6)])
        hits.append(int(cosines.argmax()) == i)
    assert scores.compute()["recall_1"].item() == pytest.approx(np.mean(hits))


@pytest.mark.parametrize(
    ("collection", "sentence"),
    [
        ({"test": [("q1", "d9", 1)]}, "qrels/test.tsv, row 1: the document `d9` is not in corpus.jsonl. Add it there"),
        ({"test": [("q9", "d1", 1)]}, "qrels/test.tsv, row 1: the query `q9` is not in queries.jsonl. Add it there"),
        ({"test": [("q1", "d1", "good")]}, "row 1: the score is `good`; a number is expected, 0 for irrelevant"),
        ({"test": [("q1", "d1", 0)]}, "Task `t` has no query with a relevant document"),
        ({"corpus": [*CORPUS, CORPUS[0]], "test": [("q1", "d1", 1)]}, "corpus.jsonl has the _id `d0` twice, in line 7"),
        ({"queries": [{"id": "q0", "text": "a"}], "test": []}, "queries.jsonl has no field `_id`"),
    ],
)
def test_a_bad_collection_is_refused_in_a_sentence(tmp_path, collection, sentence):
    write_collection(tmp_path, **collection)
    with pytest.raises(UserError, match=sentence):
        load_splits(make_task(tmp_path))


def test_a_folder_without_a_collection_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no corpus.jsonl; corpus.jsonl, queries.jsonl and qrels/test.tsv"):
        load_splits(make_task(tmp_path))
    (tmp_path / "x.json").write_text('[{"question": "a"}]')
    with pytest.raises(UserError, match="x.json is not in SQuAD's form"):
        load_splits(make_task(tmp_path, rows="questions", files=[{"test": "x.json"}]))


# Rerankers


def make_reranking(folder, **settings):
    values = {"kind": "rerank", "candidates": 3, "metrics": ("ndcg_10", "mrr_10"), "embedding": {"negatives": 1}}
    return load_splits(make_task(folder, **{**values, **settings}))


def test_a_reranker_sorts_the_documents_of_bm25(tmp_path):
    write_collection(tmp_path, train=[("q2", "d5", 1)], dev=[("q1", "d1", 1)], test=[("q3", "d2", 1), ("q5", "d1", 1)])
    splits = make_reranking(tmp_path)
    assert splits.notes[2] == (
        "test: BM25's first 3 documents hold 50.0% of the relevant ones, and their nDCG@10 is 0.5000"
    )
    data = TaskData(splits, make_tokenizer(), max_length=16, batch_size=2)
    assert [len(data.expanded(split)) for split in ("train", "test")] == [4, 6]  # train adds what BM25 does not find
    (batch,) = data.train_dataloader()
    assert sorted(batch["labels"][:, 0].tolist()) == [0.0, 1.0]
    scores = TaskMetrics(splits.task, splits.test)
    for batch in data.test_dataloader():
        scores.update(-batch["labels"][:, :1], batch["labels"])  # the relevant document comes last
    assert scores.compute()["mrr_10"].item() == pytest.approx((1 / 3 + 0) / 2)


def test_a_reranker_trains_on_relevance():
    config = BertConfig(**SHAPE, num_labels=1)
    model = KINDS["rerank"].adapt_class(BertForSequenceClassification)(config).eval()
    batch = make_batch()
    labels = KINDS["rerank"].make_labels(batch)
    output = model(input_ids=batch["input_ids"], labels=labels)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(output.logits[:, 0], labels[:, 0])
    assert output.loss.item() == pytest.approx(expected.item())
    assert type(model).__name__ == "BertForSequenceClassification" and detect_task_kind(model) == "rerank"
    assert detect_task_kind(BertForSequenceClassification(BertConfig(**SHAPE))) == "multiclass"


def test_a_reranker_needs_candidates(tmp_path):
    with pytest.raises(UserError, match="task.candidates is null, and task `t` sorts the documents of a first stage"):
        make_reranking(tmp_path, candidates=None)
