"""Define the kinds of task: what a label is, what a model answers, and which metrics judge the answers.

A new kind is a subclass of :class:`Kind` in ``KINDS``. Reading a task's config must stay cheap, so only the methods
that need torch import it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from compress.maths import scores
from compress.maths.statistics import Score
from compress.tasks.labels import (
    Columns,
    LabelledTask,
    Labels,
    encode_names,
    is_blank,
    parse_numbers,
    read_name_lists,
    read_names,
    sort_label_names,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


Probabilities = Literal["softmax", "sigmoid"] | None
"""The function from logits to probabilities; None for a regression."""


@dataclass(frozen=True)
class Metric:
    """A number that judges a model, from the arrays of :meth:`Kind.keep_answers` with one example a row.

    ``score(answers, labels, weights)`` is a function of :mod:`compress.maths.scores`, and ``read`` turns the outputs
    into the answers that it takes.
    """

    score: Score
    read: Callable[[np.ndarray], np.ndarray] = np.asarray
    higher_is_better: bool = True
    counts_examples: bool = False
    """Whether the score is the share of correct examples, for which McNemar's test is exact."""

    def compute(self, outputs: np.ndarray, labels: np.ndarray) -> float:
        """Return the score of all examples; NaN if it is undefined."""
        return float(self.score(self.read(outputs), labels, np.ones((len(labels), 1)))[0])


class Kind(ABC):
    """A kind of task; the defaults describe a text with named labels."""

    name: str
    metrics: Mapping[str, Metric]
    """Metrics that may judge a model, by their names in ``task.metrics``."""
    auto_class = "AutoModelForSequenceClassification"
    """Class of transformers that puts the head on any architecture."""
    pipeline = "text-classification"
    """Pipeline of transformers, and the tag on the hub."""
    problem_type: str | None = None
    """Value in the model's config by which transformers chooses the loss."""
    num_labels: int | None = None
    """Number of outputs for a text; None: one for each label, 0: a head without labels."""
    probabilities: Probabilities = None
    """Function that turns logits into probabilities; None if there are no probabilities."""
    flag_columns = False
    """Whether 0/1 columns, one for each label, may replace a column of labels."""
    in_blocks = False
    """Whether documents are joined and cut into blocks of tokens, which are their own labels."""
    generates = False
    """Whether the model writes text, token by token from left to right."""

    @property
    def unit(self) -> str:
        """Return the plural name of a model's input."""
        return "blocks" if self.in_blocks else "texts"

    # From a data set to labels

    def read_labels(self, columns: Columns, names: tuple[str, ...] | None, bases: dict[str, int]) -> Labels:
        """Return the labels of every split in one form; the defaults below expect names.

        Args:
            columns: the labels as the data spells them, by split.
            names: names of all labels; None if they are to be found in the data.
            bases: number of the first label, by split, where labels are numbers.

        Raises:
            LabelError: a label cannot be read.
        """
        return Labels(columns, names)

    def is_missing(self, label: Any) -> bool:
        """Return whether a row has no label and is therefore left out."""
        return is_blank(label)

    def find_label_names(self, labels: list[Any]) -> tuple[str, ...]:
        """Return the names of all labels in order."""
        return sort_label_names(labels)

    @abstractmethod
    def encode(self, task: LabelledTask, labels: list[Any], split: str) -> list[Any]:
        """Return the training targets: an index, a number or a list for every row.

        Raises:
            LabelError: the task lacks a label.
        """

    # From texts to batches

    def tokenise(self, rows: dict[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list]:
        """Return the model's input columns, and ``labels`` if the rows have labels; the ``input_ids`` of whole
        documents, if the kind cuts them into blocks.

        A text without tokens, such as an empty one where the tokenizer adds none, gets one special token.
        """
        encoded = dict(tokenizer(rows["text"], rows.get("text_pair"), truncation=True, max_length=max_length))
        for i, ids in enumerate(encoded["input_ids"]):
            if not ids:
                for name, column in encoded.items():
                    column[i] = [int(name == "attention_mask")]
                encoded["input_ids"][i] = [choose_filler(tokenizer)]
        return {**encoded, "labels": rows["label"]} if "label" in rows else encoded

    def collate_labels(self, labels: list[Any] | None, batch: dict[str, Tensor]) -> Tensor | None:
        """Return the labels of a padded batch; None if its rows have no labels."""
        import torch

        return None if labels is None else torch.tensor(labels)

    def count_examples(self, batch: dict[str, Tensor]) -> int | Tensor:
        """Return how many labels the mean loss of a batch is of."""
        return len(batch["input_ids"])

    def choose_labels(self, logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """Return a model's predictions on a batch as labels for a loss."""
        return logits.argmax(-1)

    # From a model's answers to scores

    def keep_answers(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs and labels that every metric is computed from, one example a row."""
        return logits.float(), labels

    def predict_labels(self, outputs: np.ndarray) -> np.ndarray | None:
        """Return the labels that a model chose; None if there are no labels to choose from."""
        return None

    def find_correct(self, outputs: np.ndarray, labels: np.ndarray) -> np.ndarray | None:
        """Return whether a model chose exactly an example's labels; None if the kind has no labels to choose from."""
        predicted = self.predict_labels(outputs)
        if predicted is None:
            return None
        same = predicted == labels
        return same if same.ndim == 1 else same.all(1)

    def slice_labels(self, labels: np.ndarray, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        """Return a mask of the examples of each label, by the label's name."""
        return {}


def choose_filler(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the token that is the input for a text without tokens."""
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id)
    return next((token for token in special if token is not None), 0)


class Multiclass(Kind):
    """A text has one of several labels."""

    name = "multiclass"
    metrics = MappingProxyType(
        {
            "accuracy": Metric(scores.accuracy, scores.choose_class, counts_examples=True),
            "f1_macro": Metric(scores.f1_macro, scores.choose_class),
            "f1_micro": Metric(scores.f1_micro, scores.choose_class),
            "matthews": Metric(scores.matthews, scores.choose_class),
            "roc_auc": Metric(scores.roc_auc, scores.softmax),
        }
    )
    problem_type = "single_label_classification"
    probabilities = "softmax"

    def read_labels(self, columns: Columns, names: tuple[str, ...] | None, bases: dict[str, int]) -> Labels:
        return read_names(columns, names, bases)

    def encode(self, task: LabelledTask, labels: list[Any], split: str) -> list[int]:
        return [index for (index,) in encode_names(task, ([name] for name in labels), split)]

    def predict_labels(self, outputs: np.ndarray) -> np.ndarray:
        return scores.choose_class(outputs)

    def slice_labels(self, labels: np.ndarray, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        return {name: labels == i for i, name in enumerate(names)}


class Multilabel(Kind):
    """A text has any number of labels."""

    name = "multilabel"
    metrics = MappingProxyType(
        {
            "subset_accuracy": Metric(scores.accuracy, scores.choose_labels, counts_examples=True),
            "f1_macro": Metric(scores.f1_macro, scores.choose_labels),
            "f1_micro": Metric(scores.f1_micro, scores.choose_labels),
            "roc_auc": Metric(scores.roc_auc),
        }
    )
    problem_type = "multi_label_classification"
    probabilities = "sigmoid"
    flag_columns = True

    def read_labels(self, columns: Columns, names: tuple[str, ...] | None, bases: dict[str, int]) -> Labels:
        return read_name_lists(columns, names, bases)

    def is_missing(self, label: Any) -> bool:
        return label is None  # an empty list is an answer: the text has no label at all

    def find_label_names(self, labels: list[Any]) -> tuple[str, ...]:
        return sort_label_names(chain.from_iterable(labels))

    def encode(self, task: LabelledTask, labels: list[Any], split: str) -> list[list[float]]:
        rows = map(set, encode_names(task, labels, split))
        return [[float(i in row) for i in range(task.num_labels)] for row in rows]

    def choose_labels(self, logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        return (logits > 0).float()

    def predict_labels(self, outputs: np.ndarray) -> np.ndarray:
        return scores.choose_labels(outputs)

    def slice_labels(self, labels: np.ndarray, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        return {name: labels[:, i] == 1 for i, name in enumerate(names)}


class Regression(Kind):
    """A text has a number."""

    name = "regression"
    metrics = MappingProxyType({"pearson": Metric(scores.pearson), "spearman": Metric(scores.spearman)})
    problem_type = "regression"
    num_labels = 1

    def encode(self, task: LabelledTask, labels: list[Any], split: str) -> list[float]:
        return parse_numbers(task, labels, split)


class LanguageModel(Kind):
    """A text is continued; an example is a block of tokens."""

    name = "lm"
    metrics = MappingProxyType(
        {
            "perplexity": Metric(scores.perplexity, higher_is_better=False),
            "accuracy": Metric(scores.token_accuracy),
        }
    )
    auto_class = "AutoModelForCausalLM"
    pipeline = "text-generation"
    num_labels = 0
    probabilities = "softmax"
    in_blocks = True
    generates = True

    def encode(self, task: LabelledTask, labels: list[Any], split: str) -> list[Any]:
        return labels  # none: a block of tokens is its own labels

    def tokenise(self, rows: dict[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list]:
        return {"input_ids": tokenizer(rows["text"], verbose=False)["input_ids"]}

    def collate_labels(self, labels: list[Any] | None, batch: dict[str, Tensor]) -> Tensor:
        return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    def count_examples(self, batch: dict[str, Tensor]) -> Tensor:
        return (batch["labels"][:, 1:] != -100).sum()

    def choose_labels(self, logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        labels = inputs["input_ids"].clone()
        labels[:, 1:] = logits[:, :-1].argmax(-1)  # position t predicts token t + 1
        return labels.masked_fill(inputs["attention_mask"] == 0, -100) if "attention_mask" in inputs else labels

    def keep_answers(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return two arrays: ``[blocks, 2]`` with the sum of the tokens' losses in nats and the number of correctly
        predicted tokens, and ``[blocks]`` with the number of tokens to predict. Position t predicts token t + 1."""
        import torch
        from torch.nn.functional import cross_entropy

        logits, labels = logits[:, :-1].float(), labels[:, 1:]
        losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
        predicted = labels != -100
        right = ((logits.argmax(-1) == labels) & predicted).sum(1)
        return torch.stack([losses.view_as(labels).sum(1), right.float()], dim=1), predicted.sum(1)


KINDS: dict[str, Kind] = {kind.name: kind for kind in (Multiclass(), Multilabel(), Regression(), LanguageModel())}


def higher_is_better(metric: str) -> bool:
    """Return whether a higher value of ``metric``, a metric's name or ``loss``, is better."""
    lower = (name for kind in KINDS.values() for name, entry in kind.metrics.items() if not entry.higher_is_better)
    return metric not in ("loss", *lower)
