"""Labelling of words: named entities, parts of speech."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from itertools import accumulate, chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.errors import UserError
from compress.maths import entities
from compress.maths.entities import TAGS, TYPES, count_orphans, mark_entities, marks_entities, name_types
from compress.tasks.adapting import adapt_forward
from compress.tasks.kinds.base import Answers, Format, Kind, Metric, choose_filler
from compress.tasks.labels import (
    Columns,
    LabelError,
    LabelledTask,
    Labels,
    build_name_reader,
    encode_names,
    is_blank,
    sort_label_names,
    split_cell,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

UNLABELLED = -100
"""Label of the tokens that are no word's first, which transformers leaves out of the loss."""
TAG, ROW, WORD = range(3)
"""The last axis of a batch's labels."""


class Tokens(Kind):
    """Every word of a text has a tag: of named entities (``B-person``) or of parts of speech (``NOUN``).

    The tag is predicted at a word's first token; its other tokens have no label. An example is a text. Words without an
    answer, because they are cut off, are in no entity, and the entities of the data stay whole.
    """

    name = "tokens"
    txt: Format = "conll"
    metrics = MappingProxyType(
        {
            "entity_f1": Metric(entities.entity_f1),
            "entity_precision": Metric(entities.entity_precision),
            "entity_recall": Metric(entities.entity_recall),
            "entity_f1_macro": Metric(entities.entity_f1_macro),
            "accuracy": Metric(entities.word_accuracy),
        }
    )
    auto_class = "AutoModelForTokenClassification"
    has_own_head = True
    pipeline = "token-classification"
    reading = "tags = logits[0].argmax(-1)  # a word has the tag of its first token; id2label in config.json names it\n"
    probabilities = "softmax"
    reads_words = True
    numbers_rows = True
    slice_prefix = "entity"
    cut_effect = "what is cut off counts as missed"

    # From a data set to labels

    def check_rows(self, table: Mapping[str, list[Any]], split: str) -> None:
        """Raise LabelError unless every text has a tag for each of its words."""
        for row, (words, label) in enumerate(zip(table["words"], table["label"])):
            tags = None if is_blank(label) else read_tags(label)
            if tags is not None and len(tags) != len(words):
                raise LabelError(
                    f"{len(words)} words (`{' '.join(words)[:60]}`) have {len(tags)} tags; one tag for each word is "
                    "expected. Correct the row, or set task.columns.text and task.columns.label to other columns.",
                    split,
                    row,
                )

    def read_labels(self, columns: Columns, names: tuple[str, ...] | None, bases: dict[str, int]) -> Labels:
        read, notes = {}, []
        for split, column in columns.items():
            read_name = functools.lru_cache(maxsize=10_000, typed=True)(build_name_reader(names, bases[split]))
            read[split] = [read_row(label, read_name, split, row) for row, label in enumerate(column)]
            if marks_entities(tuple(set(chain.from_iterable(tags or () for tags in read[split])))):
                orphans = sum(count_orphans(tags) for tags in read[split] if tags)
                if orphans:
                    notes.append(f"{split}: {orphans:,} entities begin with I- without a B-, and are read as entities")
        return Labels(read, names, tuple(notes))

    def is_missing(self, label: Any) -> bool:
        return not label

    def find_label_names(self, labels: list[Any]) -> tuple[str, ...]:
        return sort_label_names(chain.from_iterable(labels))

    def encode(self, task: LabelledTask, labels: list[Any], split: str) -> list[list[int]]:
        encoded = encode_names(task, labels, split)
        names, metrics = task.labels or (), getattr(task, "metrics", ())
        if any(metric.startswith("entity") for metric in metrics) and not marks_entities(names):
            raise UserError(
                f"Task `{task.name}` has the tags {', '.join(names)[:200]}, which mark no entities; O, B- and I- with "
                "a type are expected. Set task.metrics=[accuracy] task.primary=accuracy, or task.labels to the names "
                "of the tags in the order of their numbers."
            )
        return encoded

    def describe_labels(self, names: tuple[str, ...]) -> Any:
        from datasets import ClassLabel, List

        return List(ClassLabel(names=list(names)))

    # From texts to batches

    def tokenise(self, rows: dict[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list]:
        """Return the input columns; of labelled rows also ``labels`` and ``words`` of every token, and ``row``."""
        sentences = rows["words"] if "words" in rows else [text.split() for text in rows["text"]]
        encoded, places = align_words(sentences, tokenizer, max_length)
        if "label" not in rows:
            return encoded
        tags = [[UNLABELLED if word < 0 else of[word] for word in at] for at, of in zip(places, rows["label"])]
        return {**encoded, "labels": tags, "words": places, "row": rows["row"]}

    def collate(self, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
        """Return the padded batch; ``labels`` are ``[batch, tokens, 3]``: of every token its tag (-100 for none), the
        row of its text and the number of its word."""
        import torch

        own = ("labels", "words", "row")
        batch = super().collate([{key: row[key] for key in row if key not in own} for row in rows], tokenizer)
        if "labels" not in rows[0]:
            return batch
        labels = torch.full((*batch["input_ids"].shape, 3), UNLABELLED)
        for into, row in zip(labels, rows):
            into[: len(row["labels"])] = torch.tensor(
                [(tag, row["row"], word) for tag, word in zip(row["labels"], row["words"])]
            )
        return {**batch, "labels": labels}

    def count_examples(self, batch: dict[str, Tensor]) -> Tensor:
        return (read_token_labels(batch["labels"]) != UNLABELLED).sum()

    def make_labels(self, inputs: dict[str, Tensor]) -> Tensor:
        from torch.nn.functional import one_hot

        return self.choose_labels(one_hot(inputs["input_ids"] % 3).float(), inputs)

    def choose_labels(self, logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        labels = logits.argmax(-1)
        return labels.masked_fill(inputs["attention_mask"] == 0, UNLABELLED) if "attention_mask" in inputs else labels

    def mask_answers(self, inputs: dict[str, Tensor], labels: Tensor | None) -> Tensor:
        """Return the first tokens of the words; without labels, all tokens that are not padding."""
        mask = inputs["attention_mask"]
        return mask if labels is None else mask * (read_token_labels(labels) != UNLABELLED)

    # From batches to a model's answers, and to scores

    def adapt_class(self, base: Any) -> Any:
        return adapt_token_class(base)

    def keep_answers(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the chosen tags, ``[words]``, and their labels, ``[words, 3]`` as :meth:`collate` returns them. A tag
        is NaN if a logit is not finite. Every text has its first token among the words, as word -1 if it is none."""
        kept = labels[..., WORD] >= 0
        kept[:, 0] = True
        logits = logits[kept].float()
        chosen = logits.argmax(-1).float()
        return chosen.masked_fill(~logits.isfinite().all(-1), float("nan")), labels[kept]

    def collect_answers(self, outputs: np.ndarray, labels: np.ndarray, rows: Dataset | None) -> Answers:
        """Return the found and the true tags and entities of every text, as :func:`mark_entities` returns them; the
        tag is -1 after the text's last word, and where a word has no answer."""
        assert rows is not None, "the tags of words that are cut off are in the rows of the split"
        names, sentences = tuple(rows.features["label"].feature.names), rows["label"]
        answered = np.unique(labels[:, ROW])  # all rows, except in a check of a few batches
        width = max(len(sentences[row]) for row in answered)
        true = np.array([sentences[row] + [-1] * (width - len(sentences[row])) for row in answered])
        found = np.full(true.shape, -1.0, np.float32)
        words = labels[:, WORD] >= 0
        found[np.searchsorted(answered, labels[words, ROW]), labels[words, WORD]] = outputs[words]
        marked = mark_entities(np.where(np.isfinite(found), found, -1).astype(int), names).astype(np.float32)
        marked[..., TAGS] = found
        return Answers(marked, mark_entities(true, names), answered)

    def predict_labels(self, outputs: np.ndarray) -> np.ndarray:
        return outputs[..., TAGS]

    def find_correct(self, outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return whether all entities of a text are found and nothing else is; all tags, if there are no entities."""
        of = slice(TYPES, None) if (labels[..., TYPES] >= 0).any() else slice(TAGS, TYPES)
        return (outputs[..., of] == labels[..., of]).reshape(len(labels), -1).all(1)  # type: ignore[no-any-return]

    def slice_labels(self, labels: np.ndarray, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        """Return the texts with an entity of each type; if tags mark no entities, with each tag."""
        if types := name_types(names):
            return {name: (labels[..., TYPES] == i).any(1) for i, name in enumerate(types)}
        return {name: (labels[..., TAGS] == i).any(1) for i, name in enumerate(names)}


# Tags as data sets spell them


def read_tags(label: Any) -> list[Any]:
    """Return the tags of a text: a list of them, a list that was written as text, or a text with spaces."""
    if isinstance(label, str):
        return split_cell(label)
    return list(label) if hasattr(label, "__iter__") else [label]


def read_row(label: Any, read_name: Any, split: str, row: int) -> list[str] | None:
    """Return the names of a text's tags; None if they are missing.

    Raises:
        LabelError: a tag is missing, or is no name and no number.
    """
    if is_blank(label):
        return None
    tags = read_tags(label)
    for tag in tags:
        if is_blank(tag) or not isinstance(tag, (str, int, float)):
            raise LabelError(
                f"`{str(tag)[:60]}` is no tag; a name or a number is expected. Correct the row, or set "
                "task.columns.label to another column.",
                split,
                row,
            )
    return [read_name(tag) for tag in tags]


# Words and the tokens of any tokenizer


def align_words(
    sentences: list[list[str]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[dict[str, list], list[list[int]]]:
    """Return the input columns of sentences, and for each token the number of the word that it is the first token of;
    -1 for all other tokens.

    The words are joined by spaces, so that a tokenizer splits them as it splits text.

    Raises:
        UserError: a tokenizer without offsets splits words otherwise than their text.
    """
    texts = [" ".join(words) for words in sentences]
    fast = getattr(tokenizer, "is_fast", False)
    wanted = {"return_offsets_mapping": True} if fast else {"return_special_tokens_mask": True}
    encoded = dict(tokenizer(texts, truncation=True, max_length=max_length, **wanted))
    if fast:
        offsets = encoded.pop("offset_mapping")
        places = [place_by_offsets(spans, words) for spans, words in zip(offsets, sentences)]
    else:
        special = encoded.pop("special_tokens_mask")
        each = zip(encoded["input_ids"], special, sentences)
        places = [place_by_words(ids, mask, words, tokenizer) for ids, mask, words in each]
    for row, ids in enumerate(encoded["input_ids"]):
        if not ids:
            for name, column in encoded.items():
                column[row] = [int(name == "attention_mask")]
            encoded["input_ids"][row], places[row] = [choose_filler(tokenizer)], [-1]
    return encoded, places


def place_by_offsets(offsets: list[tuple[int, int]], words: list[str]) -> list[int]:
    """Return the word that each token is the first of, from the characters of the joined words that it covers."""
    starts = list(accumulate((len(word) + 1 for word in words), initial=0))
    placed, following = [], 0
    for begin, stop in offsets:
        # A token may begin with the space before its word, or be that space alone. Special tokens cover nothing.
        while following < len(words) and begin < stop and begin >= starts[following] + len(words[following]):
            following += 1
        is_first = following < len(words) and begin < stop and stop > starts[following]
        placed.append(following if is_first else -1)
        following += is_first
    return placed


def place_by_words(
    ids: list[int], special: list[int], words: list[str], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Return the word that each token is the first of, by tokenizing the words one by one."""
    inner = [token for token, mark in zip(ids, special) if not mark]
    for space in ("", " "):
        pieces = [
            tokenizer(space * (number > 0) + word, add_special_tokens=False)["input_ids"]
            for number, word in enumerate(words)
        ]
        if list(chain.from_iterable(pieces))[: len(inner)] == inner:
            firsts = chain.from_iterable(
                [number, *[-1] * (len(piece) - 1)][: len(piece)] for number, piece in enumerate(pieces)
            )
            return [-1 if mark else next(firsts) for mark in special]
    raise UserError(
        f"`{type(tokenizer).__name__}` is a tokenizer in Python, and splits `{' '.join(words)[:60]}` otherwise than "
        "its words, so that tags have no tokens. Set model.path to a folder with a tokenizer.json."
    )


# The model's class


def read_token_labels(labels: Tensor) -> Tensor:
    """Return the tags of tokens, ``[batch, tokens]``, of the labels of a batch or of tags alone."""
    return labels[..., TAG] if labels.ndim == 3 else labels


@functools.cache
def adapt_token_class(base: Any) -> Any:
    """Return a subclass of a transformers class that takes a batch's labels with the places of their words."""
    forward = base.forward

    def read_tags_first(self: Any, *args: Any, labels: Tensor | None = None, **inputs: Any) -> Any:
        if labels is None:
            return forward(self, *args, **inputs)
        labels = read_token_labels(labels).contiguous()
        output = forward(self, *args, labels=labels, **inputs)
        if not (labels != UNLABELLED).any():
            output["loss"] = output.logits.sum() * 0  # the mean over no tokens is not a number
        return output

    return adapt_forward(base, read_tags_first, "tokens")
