"""Batches are made of real splits by a tokenizer of a few words."""

import itertools

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertweetTokenizer, ByT5Tokenizer, CanineTokenizer, PhobertTokenizer, PreTrainedTokenizerFast

from compress.artifacts.artifact import save_tokenizer
from compress.errors import UserError
from compress.tasks.splits import Splits
from compress.tasks.task import Task
from compress.tasks.tokenizers import describe_rules
from compress.tasks.tokens import LengthBuckets, TaskData

WORDS = [f"w{i}" for i in range(20)]
METRIC = {"multiclass": "accuracy", "multilabel": "f1_micro", "regression": "pearson", "lm": "perplexity"}


@pytest.fixture
def tokenizer():
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", *WORDS])}
    rules = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    rules.post_processor = processors.BertProcessing(("</s>", 3), ("<s>", 2))
    return PreTrainedTokenizerFast(tokenizer_object=rules, pad_token="<pad>", unk_token="<unk>", padding_side="right")


def splits(kind="multiclass", train=40, **columns):
    """Return splits of texts of one to nine words; validation and test have other words than train."""

    def rows(count, first):
        table = {"text": [" ".join(WORDS[first + i % 3] for i in range(1 + n % 9)) for n in range(count)]}
        labels = {
            "multiclass": [n % 2 for n in range(count)],
            "multilabel": [[float(n % 2), 1.0] for n in range(count)],
            "regression": [n / 2 for n in range(count)],
        }
        return Dataset.from_dict({**table, **{name: values[:count] for name, values in columns.items()},
                                  **({} if kind == "lm" else {"label": labels[kind]})})  # fmt: skip

    task = Task(name="t", kind=kind, metrics=[METRIC[kind]], primary=METRIC[kind], labels=("a", "b"))
    return Splits(train=rows(train, 0), validation=rows(7, 5), test=rows(11, 10), task=task)


def words(loader):
    """Return the words of every text, in the order of the loader."""
    return [
        [WORDS[i - 4] for i in row if i >= 4] for batch in loader for row in batch["input_ids"].tolist()
    ]  # fmt: skip


def test_batches_are_padded_on_the_right_to_their_longest_text(tokenizer):
    for batch in TaskData(splits(), tokenizer, max_length=16, batch_size=8).train_dataloader():
        lengths = batch["attention_mask"].sum(1)
        assert batch["input_ids"].shape[1] == lengths.max()
        assert (batch["input_ids"][:, 0] == 2).all()
        for row, length in zip(batch["input_ids"], lengths):
            assert (row[:length] != 0).all() and (row[length:] == 0).all()


@pytest.mark.parametrize(
    "kind, dtype, shape", [("multiclass", torch.int64, (4,)), ("regression", torch.float32, (4,)),
                           ("multilabel", torch.float32, (4, 2))]
)  # fmt: skip
def test_labels_are_indices_numbers_or_vectors(tokenizer, kind, dtype, shape):
    labels = next(iter(TaskData(splits(kind), tokenizer, 16, batch_size=4).train_dataloader()))["labels"]
    assert (labels.dtype, labels.shape) == (dtype, shape)


def test_labels_stay_with_their_texts(tokenizer):
    data = splits()
    answers = {len(text.split()): set() for text in data.test["text"]}
    for row in data.test:
        answers[len(row["text"].split())].add(row["label"])
    for batch in TaskData(data, tokenizer, 16, batch_size=3).test_dataloader():
        for length, label in zip(batch["attention_mask"].sum(1).tolist(), batch["labels"].tolist()):
            assert label in answers[length - 2]


def test_texts_are_cut_and_pairs_are_read_together(tokenizer):
    data = splits(text_pair=["w19 w18"] * 40)
    batch = next(iter(TaskData(data, tokenizer, max_length=6, batch_size=40).test_dataloader()))
    assert batch["input_ids"].shape[1] == 6
    assert (batch["input_ids"] == tokenizer.convert_tokens_to_ids("w19")).any(1).all()


def test_texts_of_like_length_are_trained_together_and_all_are(tokenizer):
    data = splits(train=900)
    loader = TaskData(data, tokenizer, 16, batch_size=8).train_dataloader()
    padded = sum((batch["attention_mask"] == 0).sum().item() for batch in loader)
    assert padded < 0.05 * sum(len(text.split()) for text in data.train["text"])
    assert sorted(words(loader)) == sorted(text.split() for text in data.train["text"])


def test_epochs_differ_and_runs_repeat(tokenizer):
    first, second = (TaskData(splits(), tokenizer, 16, batch_size=4, seed=3).train_dataloader() for _ in range(2))
    epochs = words(first), words(first)
    assert epochs[0] != epochs[1]
    assert (words(second), words(second)) == epochs


def test_a_training_on_other_rows_reads_only_these(tokenizer):
    data = TaskData(splits(), tokenizer, 16, batch_size=8)
    data.tokenised("train")
    data.replace_training(Dataset.from_dict({"text": ["w19 w18", "w17"], "label": [0, 1]}))
    assert sorted(words(data.train_dataloader())) == [["w17"], ["w19", "w18"]]


def test_evaluation_sees_every_row_once_from_the_longest_on(tokenizer):
    data = splits()
    texts = words(TaskData(data, tokenizer, 16, batch_size=3).test_dataloader())
    assert [len(text) for text in texts] == sorted((len(text) for text in texts), reverse=True)
    assert sorted(texts) == sorted(text.split() for text in data.test["text"])


def test_calibration_is_random_training_text_and_nothing_else(tokenizer):
    data = TaskData(splits(), tokenizer, 16, seed=1)
    texts = words(data.calibration(samples=10, batch_size=4))
    assert len(texts) == 10
    assert {word for text in texts for word in text} <= set(WORDS[:3])
    assert texts == words(TaskData(splits(), tokenizer, 16, seed=1).calibration(10, 4))
    assert texts != words(TaskData(splits(), tokenizer, 16, seed=2).calibration(10, 4))


@pytest.mark.parametrize("kind", ["multiclass", "lm"])
def test_calibration_uses_other_text_if_it_is_set(tokenizer, kind):
    other = Dataset.from_dict({"text": [f"{WORDS[4]} {WORDS[4]}"] * 12})
    data = TaskData(splits(kind), tokenizer, 4, calibration_text=other)
    (batch,) = data.calibration(samples=4, batch_size=4)
    assert {word for text in words([batch]) for word in text} == {WORDS[4]}
    assert ("labels" in batch) == (kind == "lm")


def test_too_little_calibration_text_is_refused(tokenizer):
    with pytest.raises(UserError, match="asks for 41 texts and the text of task `t` has 40"):
        TaskData(splits(), tokenizer, 16).calibration(samples=41, batch_size=4)


def test_documents_are_joined_and_cut_into_blocks(tokenizer):
    data = splits("lm")
    rows = TaskData(data, tokenizer, max_length=8).tokenised("test")["input_ids"][:]
    joined = [i for text in data.test["text"] for i in tokenizer(text)["input_ids"]]
    assert all(len(row) == 8 for row in rows[:-1])
    assert [i for row in rows for i in row] == joined[: len(joined) - (len(joined) % 8 == 1)]


def test_a_language_models_labels_are_its_inputs_but_for_padding(tokenizer):
    for batch in TaskData(splits("lm"), tokenizer, max_length=8, batch_size=100).test_dataloader():
        padding = batch["attention_mask"] == 0
        assert padding.any()
        assert (batch["labels"][padding] == -100).all()
        assert (batch["labels"] == batch["input_ids"])[~padding].all()


def test_tokens_are_kept_by_content(tokenizer, tmp_path, monkeypatch):
    def tokens(data, max_length=16):
        kept = TaskData(data, tokenizer, max_length, tokens=tmp_path)
        return [kept.tokenised(split)["input_ids"][:] for split in ("train", "validation", "test")]

    def folders():
        return {path.name for path in tmp_path.iterdir() if path.is_dir()}

    first = tokens(splits())
    assert len(folders()) == 3
    with monkeypatch.context() as context:
        context.setattr(TaskData, "_tokenise", lambda *_: pytest.fail("tokenised again"))
        assert tokens(splits()) == first
    tokens(splits(), max_length=5)
    assert len(folders()) == 6
    tokens(splits(train=41))
    assert len(folders()) == 7


def test_training_batches_hold_texts_of_like_length_in_random_order():
    lengths = [n % 50 for n in range(3200)]
    buckets = LengthBuckets(lengths, batch_size=32, seed=0)
    first, second = list(buckets), list(buckets)
    assert len(first) == len(buckets) == 100
    assert sorted(i for batch in first for i in batch) == list(range(3200))
    assert first != second and list(LengthBuckets(lengths, 32, seed=0)) == first
    spreads = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in first]
    assert sum(spreads) / len(spreads) < 3  # of 49
    means = [sum(lengths[i] for i in batch) / len(batch) for batch in first]
    assert means != sorted(means) and means != sorted(means, reverse=True)
    ordered = sum(a > b for a, b in itertools.pairwise(means))
    assert 30 < ordered < 70  # about half of the steps go down


@pytest.mark.parametrize("max_length", [5, 6, 7])
def test_documents_are_tokenised_in_batches_and_cut_as_one_text(tokenizer, max_length):
    data = splits("lm", train=2500)  # more than a batch of datasets' map
    rows = TaskData(data, tokenizer, max_length).tokenised("train")
    ids = [i for text in data.train["text"] for i in tokenizer(text)["input_ids"]]
    blocks = [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
    blocks = blocks[:-1] if len(blocks[-1]) == 1 else blocks
    assert rows["input_ids"][:] == blocks
    assert rows["attention_mask"][:] == [[1] * len(block) for block in blocks]
    dtypes = {name: feature.feature.dtype for name, feature in rows.features.items()}
    assert dtypes == {"input_ids": "int32", "attention_mask": "int8"}


def test_a_language_model_reads_a_split_of_one_block_and_refuses_one_without(tokenizer):
    data = splits("lm")
    for texts, count in ((["w1"], 1), (["", ""], 1)):
        one = Splits(
            train=data.train, validation=data.validation, test=Dataset.from_dict({"text": texts}), task=data.task
        )
        assert len(list(TaskData(one, tokenizer, 8).test_dataloader())) == count  # "" is its special tokens
    tokenizer.backend_tokenizer.post_processor = None
    for texts in ([""], ["w1"]):  # one token predicts nothing
        none = Splits(
            train=data.train, validation=data.validation, test=Dataset.from_dict({"text": texts}), task=data.task
        )
        with pytest.raises(
            UserError, match=r"`t` has too little text in test for one block of two tokens. Set task.path"
        ):
            TaskData(none, tokenizer, 8).test_dataloader()


def test_texts_without_tokens_have_one_token_and_are_trained_on(tokenizer):
    tokenizer.backend_tokenizer.post_processor = None  # as of GPT-2 or Qwen2, which add no special tokens
    tokenizer.eos_token = "</s>"
    empty = Dataset.from_dict({"text": ["", "w1 w2", " "], "label": [0, 1, 0]})
    task = Task(name="t", kind="multiclass", metrics=["accuracy"], primary="accuracy", labels=("a", "b"))
    data = TaskData(Splits(train=empty, validation=empty, test=empty, task=task), tokenizer, 8, batch_size=2)
    assert data.tokenised("train")["input_ids"][:] == [[3], [5, 6], [3]]
    assert data.tokenised("train")["attention_mask"][:] == [[1], [1, 1], [1]]
    for loader in (data.train_dataloader(), data.test_dataloader(), data.calibration(3, 1), data.texts(3, "test")):
        batches = list(loader)
        assert all(batch["attention_mask"].any(1).all() for batch in batches)


def test_the_share_of_texts_that_are_cut_is_exact(tokenizer):
    data = TaskData(splits(), tokenizer, max_length=6)
    lengths = [len(text.split()) + 2 for text in data.splits.test["text"]]
    cut = sum(length > 6 for length in lengths)
    assert lengths.count(6) and 0 < cut < 11  # a text of exactly 6 tokens is whole
    assert (
        data.describe_cut("test") == f"test: {cut} of 11 texts ({cut / 11:.1%}) are cut to 6 tokens (task.max_length)"
    )
    assert TaskData(splits(), tokenizer, max_length=16).describe_cut("test") == ""
    assert TaskData(splits("lm"), tokenizer, max_length=8).describe_cut("test") == ""
    pairs = TaskData(splits(text_pair=["w1"] * 40), tokenizer, max_length=6)
    assert f"test: {sum(length + 2 > 6 for length in lengths)} of 11" in pairs.describe_cut("test")


def test_text_is_tokenised_without_a_copy_of_the_trainer_and_its_model(tokenizer, tmp_path):
    class Trainer:
        def __reduce__(self):
            raise AssertionError("the trainer was pickled")

    data = TaskData(splits(), tokenizer, max_length=16, batch_size=8, tokens=tmp_path)
    data.trainer = Trainer()
    assert len(data.tokenised("train")) == 40


def make_canine(folder):
    return CanineTokenizer()


def make_byt5(folder):
    return ByT5Tokenizer(extra_ids=3)


def make_bertweet(folder, merges=("a b</w> 9",)):
    (folder / "vocab.txt").write_text("ab 5\na@@ 4\nb 3\n")
    (folder / "bpe.codes").write_text("\n".join(merges) + "\n")
    return BertweetTokenizer(str(folder / "vocab.txt"), str(folder / "bpe.codes"))


def make_phobert(folder):
    (folder / "vocab.txt").write_text("ab 5\na@@ 4\nb 3\n")
    (folder / "bpe.codes").write_text("a b</w> 9\n")
    return PhobertTokenizer(str(folder / "vocab.txt"), str(folder / "bpe.codes"))


@pytest.mark.parametrize("make", [make_canine, make_byt5, make_bertweet, make_phobert])
def test_tokens_of_a_tokenizer_that_is_written_in_python_are_kept(make, tmp_path):
    written, kept = make(tmp_path), tmp_path / "tokens"
    before = written("ab b w3")["input_ids"]
    assert not written.is_fast
    for _ in range(2):
        save_tokenizer(written, tmp_path / "saved")
        written = type(written).from_pretrained(tmp_path / "saved")
        loader = TaskData(splits(), written, 16, batch_size=8, tokens=kept).test_dataloader()
        found = [batch["input_ids"].tolist() for batch in loader]
        plain = TaskData(splits(), written, 16, batch_size=8).test_dataloader()
        assert found == [batch["input_ids"].tolist() for batch in plain]
        assert len([path for path in kept.iterdir() if path.is_dir()]) == 1
        assert written("ab b w3")["input_ids"] == before


def test_tokens_of_other_rules_are_not_mixed_up(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir(), other.mkdir()
    rules = [describe_rules(make_bertweet(one)), describe_rules(make_bertweet(other, merges=("b a</w> 9",)))]
    assert rules[0] != rules[1] and rules[0] == describe_rules(make_bertweet(one))
