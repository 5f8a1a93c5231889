"""Questions are read as SQuAD's files write them, answered from windows of their context, and scored by its rules."""

import copy
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from squad_rules import evaluate
from test_tasks import files
from transformers import AutoModelForQuestionAnswering, BertConfig, BertForQuestionAnswering, ByT5Tokenizer

from compress.errors import PostconditionError, UserError
from compress.maths.answers import score_answer
from compress.maths.losses import gather_positions, soft_loss
from compress.measuring.measure import predict_split
from compress.measuring.predictions import compare_predictions, slice_examples
from compress.models.backbone import find_auto_class, train_tokenizer
from compress.models.layers import detect_task_kind
from compress.models.teachers import round_teacher
from compress.tasks import toy_span
from compress.tasks.kinds.span import LONGEST, OFFSETS, Span, classify_question
from compress.tasks.metrics import TaskMetrics
from compress.tasks.splits import load_splits
from compress.tasks.tokens import TaskData
from compress.tiny_models import SHAPE

COLUMNS = {"text": "question", "text_pair": "context", "label": "answers"}
SPAN = {"kind": "span", "metrics": ["f1", "exact_match"], "primary": "f1", "columns": COLUMNS}
TEXT = "Ada Lovelace, the daughter of Lord Byron, wrote notes on the Analytical Engine in 1843."


def asked(folder, **changes):
    """Return a task of questions on the user's own files."""
    return files(folder, **{**SPAN, **changes})


def write_rows(folder, *rows, **splits):
    for split in ("train", "validation", "test"):
        named = [dict(zip(("question", "context", "answers"), row)) for row in splits.get(split, rows)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, named)))


# Reading


def test_squads_files_are_read_with_and_without_answers(tmp_path):
    qas = [
        {"id": "1", "question": "Who wrote notes?", "answers": [{"text": "Ada Lovelace", "answer_start": 0}]},
        {"id": "2", "question": "Who died?", "is_impossible": True, "answers": [],
         "plausible_answers": [{"text": "Ada", "answer_start": 0}]},
    ]  # fmt: skip
    articles = [{"title": f"t{i}", "paragraphs": [{"context": TEXT, "qas": copy.deepcopy(qas)}]} for i in range(5)]
    (tmp_path / "train.json").write_text(json.dumps({"version": "v2.0", "data": articles}))
    columns = {**COLUMNS, "group": "title"}
    splits = load_splits(asked(tmp_path, rows="squad", columns=columns, holdout={"validation": 2, "test": 2}))
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [6, 2, 2]  # whole articles
    assert splits.train[0]["label"] == {"text": ["Ada Lovelace"], "answer_start": [0], "may_be_empty": True}
    assert splits.train[1]["label"] == {"text": [], "answer_start": [], "may_be_empty": True}
    assert "train: 5 of 10 questions have no answer" in splits.notes
    (tmp_path / "train.json").write_text(json.dumps({"data": [{"paragraphs": [{"qas": [{}]}]}]}))
    with pytest.raises(UserError, match=r"expects squad, which the columns paragraphs do not hold\. Set task.path"):
        load_splits(asked(tmp_path, rows="squad"))


def test_answers_are_lists_objects_or_text(tmp_path):
    answers = [
        {"text": ["Ada", "Ada Lovelace"], "answer_start": [0, 0]},
        [{"text": "1843", "answer_start": 82}],
        "Lord Byron",
        ["notes"],
        None,
    ]
    write_rows(tmp_path, *(("who?", TEXT, answer) for answer in answers), test=[("who?", TEXT, []), ("who?", TEXT, "")])
    splits = load_splits(asked(tmp_path))
    assert [row["text"] for row in splits.train["label"]] == [
        ["Ada", "Ada Lovelace"],
        ["1843"],
        ["Lord Byron"],
        ["notes"],
    ]
    assert not splits.train[0]["label"]["may_be_empty"] and [row["text"] for row in splits.test["label"]] == [[], []]
    assert "train: 1 rows without a label left out" in splits.notes
    assert any(note.startswith("test: 2 of 2 questions have no answer, and train has none") for note in splits.notes)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([{"text": "Byron", "answer_start": 30}],
         r"^train.jsonl, row 2, column `answers`: the question `who\?` has the answer `Byron` with answer_start 30, "
         r"where its context has `Lord `; the answer first occurs at 35\. Correct answer_start\."),
        ([{"text": "Byron", "answer_start": -5}], r"row 2, .*has the answer `Byron` with answer_start -5, where"),
        ("Babbage", r"row 2, .* has the answer `Babbage`, which is not in its context\. Correct the answer"),
        ([" "], r"row 2, column `answers`: `\[' '\]` is no answer; .* is expected, and an empty list for none"),
        ({"text": ["Ada"], "answer_start": []}, r"row 2, .* is no answer"),
        ([{"text": "Ada", "answer_start": "0"}], r"row 2, .* is no answer"),
        (7, r"row 2, column `answers`: `7` is no answer"),
    ],
)  # fmt: skip
def test_a_wrong_answer_is_named_with_its_file_and_row(tmp_path, answer, message):
    write_rows(tmp_path, ("who?", TEXT, "Ada"), ("who?", TEXT, answer))
    with pytest.raises(UserError, match=message):
        load_splits(asked(tmp_path))


def test_a_question_needs_a_context_and_a_window_room_for_it(tmp_path):
    write_rows(tmp_path, ("who?", TEXT, "Ada"), ("when?", f"{TEXT} Yes.", "1843"))
    with pytest.raises(UserError, match=r"task.columns.text_pair is null; a question's context is expected"):
        load_splits(asked(tmp_path, columns={**COLUMNS, "text_pair": None}))
    splits = load_splits(asked(tmp_path))
    tokenizer = train_tokenizer([TEXT], BertConfig(vocab_size=300))
    with pytest.raises(UserError, match=r"task.max_length is 9, which leaves no room .*Set task.max_length=12 or more"):
        TaskData(splits, tokenizer, max_length=9).tokenised("train")
    with pytest.raises(UserError, match=r"`ByT5Tokenizer` is a tokenizer in Python, .*Set model.path"):
        TaskData(splits, ByT5Tokenizer(), max_length=64).tokenised("train")


# Windows


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return the generated questions, in contexts that take several windows, with a test split of 120."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    rows = []
    for _ in range(160):
        question, context, answers = toy_span.generate_question(rng)
        rows.append((question, f"{context}  {'It rained. ' * rng.randrange(12)}", answers))
    write_rows(folder, train=rows[:20], validation=rows[20:40], test=rows[40:])
    tokenizer = train_tokenizer([f"{question} {context}" for question, context, _ in rows], BertConfig(vocab_size=400))
    return TaskData(load_splits(asked(folder)), tokenizer, max_length=36, batch_size=8)


def answer_by_labels(batch):
    """Return logits that choose the true answer of every window."""
    labels, logits = batch["labels"], torch.zeros(*batch["input_ids"].shape, 2)
    windows = torch.arange(len(labels))
    logits[windows, labels[:, 1], 0] = logits[windows, labels[:, 2], 1] = 9.0
    return logits


def bench(data, answer):
    batches = list(data.test_dataloader())

    def model(input_ids, **_):
        return SimpleNamespace(logits=answer(next(b for b in batches if b["input_ids"].equal(input_ids))))

    return SimpleNamespace(artifact=SimpleNamespace(model=model), batched=batches, data=data, split="test")


def read_texts(data, answers):
    """Return the answers as text from the stored predictions."""
    contexts = data.splits.test["text_pair"]
    return [
        "" if begin < 0 else context[int(begin) : int(end)]
        for context, (begin, end, *_) in zip(contexts, answers.outputs)
    ]


def test_a_model_that_knows_every_window_answers_every_question(data):
    assert len(data.tokenised("test")) > 1.5 * len(data.splits.test)
    for batch in data.test_dataloader():
        assert (
            batch["input_ids"].shape[1] <= 36 and batch["labels"].shape[1] == OFFSETS + 2 * batch["input_ids"].shape[1]
        )
    quality, answers = predict_split(bench(data, answer_by_labels), data.splits.task, torch.device("cpu"))
    assert quality == {"f1": 1.0, "exact_match": 1.0} and answers.correct_examples.all()
    golds = [label["text"] for label in data.splits.test["label"]]
    assert read_texts(data, answers) == [(texts or [""])[0] for texts in golds]
    slices = slice_examples(answers)
    assert {"question who", "question when", "question without an answer"} <= slices.keys()
    assert slices["question without an answer"].sum() == sum(not texts for texts in golds)
    # Every text is timed and measured once, by the window that it begins with
    assert len(data.words("test")) == len(answers.tokens) == 120 and answers.tokens.max() > 36
    assert data.texts(3, "test")[-1]["input_ids"].shape[1] == 36 and not data.describe_cut("test")


def test_stored_answers_are_scored_as_squads_own_script_scores_them(data):
    generator = torch.Generator().manual_seed(0)

    def doubt(batch):
        return answer_by_labels(batch) + 4 * torch.randn(*batch["input_ids"].shape, 2, generator=generator)

    task = data.splits.task
    quality, answers = predict_split(bench(data, doubt), task, torch.device("cpu"))
    golds = [label["text"] for label in data.splits.test["label"]]
    exact, f1 = evaluate(read_texts(data, answers), golds, version=2)
    assert quality == pytest.approx({"f1": f1, "exact_match": exact}) and 0.2 < exact < f1 < 0.95
    scores = TaskMetrics(task, data.splits.test)
    for batch in reversed(list(data.test_dataloader())):  # in any order
        scores.update(answer_by_labels(batch), batch["labels"])
    assert float(scores.compute()["f1"]) == 1.0
    _, knowing = predict_split(bench(data, answer_by_labels), task, torch.device("cpu"))
    change = compare_predictions(answers, knowing, "f1")
    assert change.change.value == pytest.approx(1 - f1) and change.p_value < 0.01
    assert change.churn == pytest.approx(1 - exact, abs=0.1)


def test_an_answer_has_a_largest_length_and_is_in_the_context(data):
    batch = next(b for b in data.test_dataloader() if b["input_ids"].shape[1] == 36)
    inside = (batch["labels"][:, OFFSETS : OFFSETS + 36] >= 0).nonzero()
    row = int(inside[0, 0])
    places = inside[inside[:, 0] == row, 1]
    logits = torch.zeros(*batch["input_ids"].shape, 2)
    logits[:, 0] = 50.0  # the first token is never a part of an answer
    logits[row, places[-1], 0] = logits[row, places[0], 1] = 20.0  # an end before its beginning
    logits[row, places[2], 0] = logits[row, places[3], 1] = 5.0
    outputs, _ = Span().keep_answers(logits, batch["labels"])
    begins, ends = batch["labels"][:, OFFSETS:].split(36, dim=1)
    assert outputs[row, 0] == 20.0 and outputs[row, 3] == 100.0
    assert (outputs[:, 1] >= 0).all() and (outputs[:, 2] > outputs[:, 1]).all()
    long = torch.full((1, OFFSETS + 2 * 60), 0)
    long[0, OFFSETS : OFFSETS + 60], long[0, OFFSETS + 60 :] = torch.arange(60), torch.arange(1, 61)
    logits = torch.zeros(1, 60, 2)
    logits[0, 10, 0], logits[0, 10 + LONGEST, 1], logits[0, 9 + LONGEST, 1] = 5.0, 9.0, 2.0
    assert Span().keep_answers(logits, long)[0][0, 1:3].tolist() != [10, 11 + LONGEST]
    assert begins.shape == ends.shape


def test_an_infinite_logit_is_no_answer(data):
    def broken(batch):
        return torch.full((*batch["input_ids"].shape, 2), float("nan"))

    with pytest.raises(PostconditionError, match="120 of the 120 examples of the test split are not finite"):
        predict_split(bench(data, broken), data.splits.task, torch.device("cpu"))


def test_words_are_compared_as_squad_compares_them():
    rng = random.Random(1)
    pool = ["the", "a", "The cat", "cat!", "an  owl", "owl", "", "cats and dogs", "dogs", "1,843", "1843", "—"]
    for _ in range(300):
        found, golds = " ".join(rng.choices(pool, k=rng.randrange(3))), [" ".join(rng.choices(pool, k=2)) for _ in "ab"]
        for version in (1, 2):
            assert score_answer(found, golds, version == 2) == pytest.approx(evaluate([found], [golds], version))
    assert score_answer("", [], True) == (1, 1) and score_answer("x", [], True) == (0, 0)
    assert [classify_question(q) for q in ("In what year?", "Whose cat?", "Is it?")] == [1, 0, 7]


# The model


@pytest.fixture
def model():
    torch.manual_seed(0)
    return find_auto_class(
        "span", config := BertConfig(**SHAPE | {"vocab_size": 400}, max_position_embeddings=40)
    ).from_config(config)


def test_the_class_of_a_model_is_transformers_own_with_logits(model, data, tmp_path):
    batch = next(iter(data.test_dataloader()))
    labels = batch.pop("labels")
    model.eval().save_pretrained(tmp_path)
    loaded, report = AutoModelForQuestionAnswering.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is BertForQuestionAnswering and not any(report.values())
    assert detect_task_kind(model) == detect_task_kind(loaded) == "span"
    expected = loaded(**batch, start_positions=labels[:, 1], end_positions=labels[:, 2])
    output = model(**batch, labels=labels, output_hidden_states=True)
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output.logits[..., 1], expected.end_logits)
    assert len(output.hidden_states) == 3
    chosen = Span().choose_labels(output.logits, batch)
    assert model(**batch, labels=chosen).loss < output.loss
    assert round_teacher(model, batch, "positions") is not None


def test_a_softmax_over_positions_leaves_padding_out():
    torch.manual_seed(0)
    student, teacher, mask = torch.randn(2, 5, 2), torch.randn(2, 5, 2), torch.ones(2, 5)
    mask[0, 3:] = 0
    for name in ("ce", "kl", "js", "reverse_kl"):
        loss = soft_loss(name, student, teacher, 2.0, mask, "positions")
        other = student.clone()
        other[0, 3:] += 100
        assert loss.isfinite() and torch.equal(loss, soft_loss(name, other, teacher, 2.0, mask, "positions"))
        rows = [(student[0, :3, i], teacher[0, :3, i]) for i in range(2)] + [
            (student[1, :, i], teacher[1, :, i]) for i in range(2)
        ]
        by_hand = torch.stack([soft_loss(name, s[None], t[None], 2.0) for s, t in rows]).mean()
        torch.testing.assert_close(loss, by_hand)
    assert gather_positions(student, mask).softmax(-1)[0, :, 3:].sum() == 0
    assert np.isfinite(soft_loss("mse", student, teacher, 1.0, mask, "positions"))
