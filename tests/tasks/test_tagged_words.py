"""Words and their tags are read as data sets write them, and every word's first token is labelled."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_tasks import files, shipped
from tokenizers import pre_tokenizers, processors
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForTokenClassification,
    BertConfig,
    BertForTokenClassification,
    BertTokenizer,
    BertweetTokenizer,
    ByT5Tokenizer,
)

from compress.errors import PostconditionError, UserError
from compress.maths.entities import list_entities
from compress.measuring.measure import predict_split
from compress.measuring.predictions import compare_predictions, measure_regressions
from compress.models.backbone import Backbone, find_auto_class, train_tokenizer
from compress.models.layers import detect_task_kind
from compress.tasks.kinds.tokens import align_words
from compress.tasks.metrics import TaskMetrics
from compress.tasks.splits import load_splits
from compress.tasks.tokens import TaskData
from compress.technique import Training
from compress.techniques.distill import Distill
from compress.tiny_models import SHAPE, make_tokenizer, make_trainer

seqeval = pytest.importorskip("seqeval.metrics", reason="seqeval is not installed: pip install -e '.[dev]'")
CONLL = "\n".join(
    ["-DOCSTART- -X- -X- O", "", "EU NNP B-NP B-ORG", "rejects VBZ B-VP O", "German JJ B-NP B-MISC", "call NN I-NP O"]
    + ["", "Peter NNP B-NP I-PER", "Blackburn NNP I-NP I-PER", "", ""]
)
ENTITIES = {"kind": "tokens", "metrics": ["entity_f1", "accuracy"], "primary": "entity_f1"}


def tagged(folder, **changes):
    """Return a task of words and tags on the user's own files."""
    return files(folder, **{**ENTITIES, "columns": {"text": "words", "label": "tags"}, **changes})


def write_rows(folder, *rows, **splits):
    for split in ("train", "validation", "test"):
        lines = [{"words": words, "tags": tags} for words, tags in splits.get(split, rows)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))


# Reading


@pytest.mark.parametrize("name", ["train.txt", "train.conll", "train.bio", "train.annotated"])
def test_conlls_columns_are_read_under_any_ending(tmp_path, name):
    (tmp_path / name).write_bytes(CONLL.replace("\n", "\r\n").encode())
    for split in ("validation", "test"):
        (tmp_path / f"{split}.txt").write_text(CONLL)
    named = {"file": "test.txt", "names": ["w", "pos", "chunk", "ner"], "columns": {"text": "w", "label": "ner"}}
    splits = load_splits(tagged(tmp_path, files=[{"train": name, "validation": "validation.txt", "test": named}]))
    assert splits.task.labels == ("B-MISC", "B-ORG", "I-PER", "O")
    assert splits.train["words"][:] == [["EU", "rejects", "German", "call"], ["Peter", "Blackburn"]]
    assert splits.train["label"][:] == splits.test["label"][:] == [[1, 3, 0, 3], [2, 2]]
    assert splits.train["text"][0] == "EU rejects German call"
    assert f"{name}: 1 lines -DOCSTART- left out" in splits.notes
    assert "train: 1 entities begin with I- without a B-, and are read as entities" in splits.notes


def test_universal_dependencies_files_have_named_columns(tmp_path):
    rows = (
        "# text = can't\n1-2\tcan't" + "\t_" * 8 + "\n1\tca\tcan\tAUX" + "\t_" * 6 + "\n2\tn't\tnot\tPART" + "\t_" * 6
    )
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}.conllu").write_text(f"{rows}\n\n")
    columns = {"text": "form", "label": "upos"}
    splits = load_splits(tagged(tmp_path, metrics=["accuracy"], primary="accuracy", columns=columns))
    assert splits.train["words"][:] == [["ca", "n't"]] and splits.task.labels == ("AUX", "PART")


def test_tags_are_names_or_numbers_in_lists_or_text(tmp_path):
    names = ["O", "B-x", "I-x"]
    write_rows(
        tmp_path,
        (["New", "York"], [1, 2]),
        ("Rome  is", "B-x O"),
        (["a b", ""], "['O', 'B-x']"),
        ([], []),
        (["None"], None),
    )
    splits = load_splits(tagged(tmp_path, labels=names))
    assert splits.train["label"][:] == [[1, 2], [1, 0], [0, 1]]
    assert splits.train["words"][:] == [["New", "York"], ["Rome", "is"], ["a b", ""]]  # as the lists have them
    assert "train: 2 rows without a label left out" in splits.notes
    assert splits.train.features["label"].feature.names == names


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([(["a", "b"], ["O", "B-x"]), (["a", "b"], ["O"])], {},
         r"^train.jsonl, row 2, column `tags`: 2 words \(`a b`\) have 1 tags; one tag for each word is expected\."),
        ([(["a"], ["O"]), (["b"], [None])], {}, r"^train.jsonl, row 2, column `tags`: `None` is no tag"),
        ([(["a"], [{"x": 1}])], {}, r"^train.jsonl, row 1, column `tags`: `{'x': 1}` is no tag; .* Correct the row"),
        ([(["a", "b"], ["O", "B-x"]), (["a"], ["B-y"])], {"labels": ["O", "B-x"]},
         r"^train.jsonl, row 2, column `tags`: Task `files` has the label `B-y` in train; O, B-x are known\."),
        ([(["a", "b"], ["NOUN", "VERB"])], {}, r"has the tags NOUN, VERB, which mark no entities; .*task.metrics="),
        ([(["a", "b"], [0, 1])], {}, r"has the tags 0, 1, which mark no entities; .* task.labels to the names"),
        ([([["a"]], ["O"])], {}, r"^train.jsonl, row 1, column `words`: .* is not text but list"),
        ([(["a"], ["O"])], {"columns": {"text": ["words", "words"], "label": "tags"}}, r"Set task.columns.text to one"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_file_and_row(tmp_path, rows, changes, message):
    write_rows(tmp_path, *rows)
    with pytest.raises(UserError, match=message):
        load_splits(tagged(tmp_path, **changes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\tO\nb\nc\tO\n", r"^train.conll could not be read as conll \(line 2, `b`, has 1; 2 columns"),
        ("a b\nO\n", r"line 2, `O`, has 1; 2 columns"),
        ("word\n", r"line 1, `word`, has 1; a word and its tag are expected"),
    ],
)
def test_a_line_without_a_tag_is_named(tmp_path, text, message):
    (tmp_path / "train.conll").write_text(text)
    with pytest.raises(UserError, match=message):
        load_splits(tagged(tmp_path))


# Alignment

SENTENCES = [["Él", "don't", "(New", "York)", "\u200b", "ok"], ["wizardry"], ["a" * 30, "b"]]


def make_byte_level(prefix):
    fast = train_tokenizer(["New York wizard ok"] * 3, BertConfig(vocab_size=300))
    fast.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    ends = ("[SEP]", 3), ("[CLS]", 2)
    fast.backend_tokenizer.post_processor = processors.RobertaProcessing(*ends, trim_offsets=prefix)
    return fast


def make_word_piece():
    pieces = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", *"(')abdelnoty", *"##izrdy", "el", "new", "york", "ok", "w"]
    pieces += [f"##{letter}" for letter in "abdeilnorty"]
    return BertTokenizer(vocab={piece: i for i, piece in enumerate(dict.fromkeys(pieces))})


def simplify(text):
    return text.lower().replace("é", "e").replace("\u200b", "").replace(" ", "")


@pytest.mark.parametrize(
    "make",
    [make_word_piece, lambda: make_byte_level(True), lambda: make_byte_level(False), ByT5Tokenizer],
    ids=["WordPiece", "prefix space", "no prefix space", "Python"],
)
def test_every_words_first_token_and_no_other_is_labelled(make):
    tokenizer = make()
    encoded, places = align_words(SENTENCES, tokenizer, 200)
    for ids, at, words in zip(encoded["input_ids"], places, SENTENCES):
        assert ids == tokenizer(" ".join(words))["input_ids"] and len(at) == len(ids)
        labelled = [word for word in at if word >= 0]
        assert labelled == sorted(set(labelled)) and set(range(len(words))) - set(labelled) <= {4}
        for word in labelled:  # the tokens from this word's first to the next word's first spell the word
            first = at.index(word)
            stop = next((i for i in range(first + 1, len(at)) if at[i] >= 0), len(at))
            spelled = tokenizer.decode(ids[first:stop], skip_special_tokens=True)
            if tokenizer.unk_token_id not in ids[first:stop]:
                assert simplify(spelled) == simplify(words[word])
    assert max(align_words([["x"] * 50], tokenizer, 12)[1][0]) < 11  # the words after are cut


def test_a_python_tokenizer_that_splits_words_otherwise_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("ab 3\n")
    (tmp_path / "bpe.codes").write_text("a b</w> 3\n")
    tokenizer = BertweetTokenizer(str(tmp_path / "vocab.txt"), str(tmp_path / "bpe.codes"))
    tokenizer._tokenize = lambda text: text.split() if " " in text else list(text)
    with pytest.raises(UserError, match=r"`BertweetTokenizer` .* splits `ab ab` otherwise than its words, .*Set model"):
        align_words([["ab", "ab"]], tokenizer, 16)


# Scores


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    names = ["O", "B-x", "I-x", "B-y", "I-y"]

    def rows(count):
        return [([*"abcdefghij"][: 2 + n % 9], [names[i] for i in rng.integers(0, 5, 2 + n % 9)]) for n in range(count)]

    write_rows(tmp_path, train=rows(20), validation=rows(10), test=rows(60))
    splits = load_splits(tagged(tmp_path, labels=names))
    return TaskData(splits, make_tokenizer(), max_length=8, batch_size=8)


def bench(model, data):
    return SimpleNamespace(
        artifact=SimpleNamespace(model=model), batched=data.test_dataloader(), data=data, split="test"
    )


def test_stored_predictions_are_scored_as_seqeval_scores_them_and_cut_words_are_missed(data):
    torch.manual_seed(0)
    table = torch.randn(60, 5)

    def guess(input_ids, attention_mask, **_):
        return SimpleNamespace(logits=table[input_ids])

    task = data.splits.task
    scores = TaskMetrics(task, data.splits.test)
    for batch in data.test_dataloader():
        assert (batch["labels"][..., 0] >= 0).sum() == data.kind.count_examples(batch)
        scores.update(guess(**batch).logits, batch["labels"])
    quality, answers = predict_split(bench(guess, data), task, torch.device("cpu"))
    assert quality == pytest.approx({name: float(value) for name, value in scores.compute().items()})
    # 1) As seqeval does, from the tags of the data and the stored tags
    words = data.splits.test["words"]
    true = [[task.labels[i] for i in row] for row in data.splits.test["label"]]
    found = [
        [task.labels[int(i)] if i >= 0 else "O" for i in row[: len(of), 0]] for row, of in zip(answers.outputs, words)
    ]
    assert quality["entity_f1"] == pytest.approx(seqeval.f1_score(true, found)) and quality["entity_f1"] > 0.05
    assert [[*map(tuple, row)] for row in list_entities(answers.labels, task.labels)] == [
        seqeval.sequence_labeling.get_entities(row) for row in true
    ]
    # 2) The texts have up to 10 words, each of one token
    assert (answers.outputs[:, 8:, 0] == -1).all() and (answers.labels[:, 8:, 1] >= 0).any()
    assert "are cut to 8 tokens (task.max_length); what is cut off counts as missed" in data.describe_cut("test")

    # 3) The better of two models is seen to be so
    def know(input_ids, attention_mask, **_):
        logits, labels = table[input_ids].clone(), next(b["labels"] for b in batches if b["input_ids"].equal(input_ids))
        right = labels[..., 0].clamp(min=0)
        return SimpleNamespace(logits=logits.scatter(-1, right[..., None], 9.0))

    batches = list(data.test_dataloader())
    _, better = predict_split(bench(know, data), task, torch.device("cpu"))
    change = compare_predictions(answers, better, "entity_f1")
    assert change.change.low > 0.2 and change.p_value < 0.01 and change.churn > 0.9
    assert {"entity x", "entity y"} <= {slice.name for slice in measure_regressions(answers, better, "entity_f1")}


def test_an_infinite_logit_is_no_answer(data):
    def broken(input_ids, attention_mask, **_):
        return SimpleNamespace(logits=torch.full((*input_ids.shape, 5), float("nan")))

    with pytest.raises(PostconditionError, match="60 of the 60 examples of the test split are not finite"):
        predict_split(bench(broken, data), data.splits.task, torch.device("cpu"))


# The model


def test_the_class_of_a_model_is_transformers_own_and_takes_our_labels(data, tmp_path):
    config = BertConfig(**SHAPE, max_position_embeddings=40, num_labels=5)
    model = find_auto_class("tokens", config).from_config(config)
    assert find_auto_class("tokens", config) is find_auto_class("tokens", config)
    batch = data.collate([data.tokenised("train")[i] for i in range(6)])
    plain = BertForTokenClassification(config)
    plain.load_state_dict(model.state_dict())
    tags = batch.pop("labels")
    assert (tags[:, 0, 0] >= 0).all() and (tags[..., 0] == -100).any()  # this tokenizer adds no special tokens
    for either in (model.eval(), plain.eval()):
        assert detect_task_kind(either) == "tokens"
    torch.testing.assert_close(model(**batch, labels=tags).loss, plain(**batch, labels=tags[..., 0]).loss)
    assert model(**batch, labels=torch.full_like(tags, -100)).loss == 0
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForTokenClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is BertForTokenClassification and not any(report.values())
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)


def test_a_skeleton_names_its_tags():
    model = Backbone("b", config={"model_type": "distilbert", "vocab_size": 9, "dim": 8, "n_heads": 2}).skeleton(
        shipped("wnut17")
    )
    assert type(model).__name__ == "DistilBertForTokenClassification" and model.config.id2label[1] == "B-corporation"


class Shifted(torch.nn.Module):
    """A teacher with other logits at every second token."""

    def __init__(self, model, by):
        super().__init__()
        self.model, self.config, self.by = model, model.config, by

    def forward(self, input_ids, **inputs):
        logits = self.model(input_ids=input_ids, **inputs).logits.clone()
        logits[:, 1::2] += self.by * torch.arange(5.0)
        return SimpleNamespace(logits=logits)


def test_a_student_imitates_the_tokens_that_are_labelled(data):
    config = BertConfig(**SHAPE, max_position_embeddings=40, num_labels=5)
    teacher = find_auto_class("tokens", config).from_config(config).eval()
    batch = data.collate([data.tokenised("train")[i] for i in range(6)])
    batch["labels"][:, 1::2, 0] = -100
    weights = []
    for by in (0.0, 9.0):
        torch.manual_seed(1)
        student = find_auto_class("tokens", config).from_config(config)
        stage = Distill(student, teacher=Shifted(teacher, by), teacher_dtype="float32", training=Training(epochs=1))
        make_trainer(epochs=1).fit(stage, DataLoader([batch], batch_size=None))
        weights.append(stage.model.classifier.weight)
    assert torch.equal(*weights)
