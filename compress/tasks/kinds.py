"""The kinds of task, an object each: what a label is, what a model answers, and which metrics judge it.

A new kind is a subclass of :class:`Kind` in ``KINDS``. Naming a task must stay cheap, so torch is imported by the
methods that need it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from compress.maths import scores
from compress.tasks.labels import build_label_index, parse_numbers, sort_label_names, split_labels

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from compress.tasks.task import Task


@dataclass(frozen=True)
class Metric:
    """A number that judges a model, from arrays with an example a row, as :meth:`Kind.keep_answers` makes them."""

    score: Callable[[np.ndarray, np.ndarray], float]
    higher_is_better: bool = True
    counts_examples: bool = False
    """Whether the score is the share of the examples that are right, for which McNemar's test is exact."""


class Kind:
    """A kind of task; the defaults are those of a text with labels that have names."""

    name: str
    metrics: Mapping[str, Metric]
    """The metrics that may judge a model, by their names in ``task.metrics``."""
    auto_class = "AutoModelForSequenceClassification"
    """The class of transformers that puts the head on any architecture."""
    pipeline = "text-classification"
    """The pipeline of transformers, and the tag on the hub."""
    problem_type: str | None = None
    """The value in the model's config by which transformers chooses the loss."""
    num_labels: int | None = None
    """The numbers that a model gives for a text; None for a number for each label, 0 for a head without labels."""
    probabilities: Literal["softmax", "sigmoid"] | None = None
    """The function that makes probabilities of logits; None if there are none."""
    flag_columns = False
    """Whether a 0/1 column for each label may take the place of a column of labels."""
    in_blocks = False
    """Whether documents are joined and cut into blocks of tokens, which are their own labels."""
    generates = False
    """Whether the model writes text, token by token from left to right."""

    @property
    def unit(self) -> str:
        """The name of what a model reads at once."""
        return "blocks" if self.in_blocks else "texts"

    # From a data set to labels

    def is_missing(self, label: Any) -> bool:
        """Return whether a row has no label, and so is left out."""
        return label is None or label == ""

    def find_label_names(self, labels: list[Any]) -> tuple[str, ...]:
        """Return the names of all labels in order."""
        return sort_label_names(labels)

    def encode(self, task: Task, labels: list[Any], split: str) -> list[Any]:
        """Return what a model learns: an index, a number or a list for every row.

        Raises:
            UserError: a label is none of the task's.
        """
        raise NotImplementedError

    # From texts to batches

    def tokenise(self, rows: dict[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list]:
        """Return the columns that a model reads, and ``labels`` where the rows have labels."""
        encoded = tokenizer(rows["text"], rows.get("text_pair"), truncation=True, max_length=max_length)
        return {**encoded, "labels": rows["label"]} if "label" in rows else dict(encoded)

    def collate_labels(self, labels: list[Any] | None, batch: dict[str, Tensor]) -> Tensor | None:
        """Return the labels of a padded batch, None where its rows have none."""
        import torch

        return None if labels is None else torch.tensor(labels)

    def choose_labels(self, logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """Return the labels of a batch by a model's own answers, as a loss takes them."""
        return logits.argmax(-1)

    # From a model's answers to scores

    def keep_answers(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs and the labels, an example a row, from which every metric is computed."""
        return logits.float(), labels

    def predict_labels(self, outputs: np.ndarray) -> np.ndarray | None:
        """Return the labels that a model chose, None where there are no labels to choose from."""
        return None

    def find_correct(self, outputs: np.ndarray, labels: np.ndarray) -> np.ndarray | None:
        """Return whether a model chose all of an example's labels and no other, None where it chooses none."""
        predicted = self.predict_labels(outputs)
        if predicted is None:
            return None
        same = predicted == labels
        return same if same.ndim == 1 else same.all(1)

    def slice_labels(self, labels: np.ndarray, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        """Return the examples of each label, as masks by the label's name."""
        return {}


class Multiclass(Kind):
    """A text has one of several labels."""

    name = "multiclass"
    metrics = MappingProxyType(
        {
            "accuracy": Metric(scores.class_accuracy, counts_examples=True),
            "f1_macro": Metric(lambda logits, labels: scores.f1_macro(*scores.class_columns(logits, labels))),
            "f1_micro": Metric(lambda logits, labels: scores.f1_micro(*scores.class_columns(logits, labels))),
            "matthews": Metric(scores.matthews),
            "roc_auc": Metric(
                lambda logits, labels: scores.roc_auc(scores.softmax(logits), scores.class_columns(logits, labels)[1])
            ),
        }
    )
    problem_type = "single_label_classification"
    probabilities = "softmax"

    def encode(self, task: Task, labels: list[Any], split: str) -> list[int]:
        return list(map(build_label_index(task, split), labels))

    def predict_labels(self, outputs: np.ndarray) -> np.ndarray:
        return outputs.argmax(-1)

    def slice_labels(self, labels: np.ndarray, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        return {name: labels == i for i, name in enumerate(names)}


class Multilabel(Kind):
    """A text has any number of labels."""

    name = "multilabel"
    metrics = MappingProxyType(
        {
            "subset_accuracy": Metric(scores.subset_accuracy, counts_examples=True),
            "f1_macro": Metric(lambda logits, labels: scores.f1_macro(*scores.label_columns(logits, labels))),
            "f1_micro": Metric(lambda logits, labels: scores.f1_micro(*scores.label_columns(logits, labels))),
            "roc_auc": Metric(lambda logits, labels: scores.roc_auc(logits, labels > 0)),
        }
    )
    problem_type = "multi_label_classification"
    probabilities = "sigmoid"
    flag_columns = True

    def is_missing(self, label: Any) -> bool:
        return label is None  # an empty one is an answer: the text has no label at all

    def find_label_names(self, labels: list[Any]) -> tuple[str, ...]:
        return sort_label_names(chain.from_iterable(map(split_labels, labels)))

    def encode(self, task: Task, labels: list[Any], split: str) -> list[list[float]]:
        find_index = build_label_index(task, split)
        there = [{find_index(label) for label in split_labels(each)} for each in labels]
        return [[float(i in indices) for i in range(task.num_labels)] for indices in there]

    def choose_labels(self, logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        return (logits > 0).float()

    def predict_labels(self, outputs: np.ndarray) -> np.ndarray:
        return outputs > 0

    def slice_labels(self, labels: np.ndarray, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        return {name: labels[:, i] == 1 for i, name in enumerate(names)}


class Regression(Kind):
    """A text has a number."""

    name = "regression"
    metrics = MappingProxyType({"pearson": Metric(scores.pearson), "spearman": Metric(scores.spearman)})
    problem_type = "regression"
    num_labels = 1

    def encode(self, task: Task, labels: list[Any], split: str) -> list[float]:
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

    def tokenise(self, rows: dict[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list]:
        ids = list(chain.from_iterable(tokenizer(rows["text"], verbose=False)["input_ids"]))
        cuts = [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
        blocks = [block for block in cuts if len(block) > 1]  # one token predicts nothing
        return {"input_ids": blocks, "attention_mask": [[1] * len(block) for block in blocks]}

    def collate_labels(self, labels: list[Any] | None, batch: dict[str, Tensor]) -> Tensor:
        return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    def choose_labels(self, logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        labels = inputs["input_ids"].clone()
        labels[:, 1:] = logits[:, :-1].argmax(-1)  # position t predicts token t + 1
        return labels.masked_fill(inputs["attention_mask"] == 0, -100) if "attention_mask" in inputs else labels

    def keep_answers(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return, of every block, the sum of its tokens' losses in nats beside how many tokens are predicted right,
        ``[blocks, 2]``, and how many there are to predict. Position t of the logits predicts token t + 1."""
        import torch
        from torch.nn.functional import cross_entropy

        logits, labels = logits[:, :-1].float(), labels[:, 1:]
        losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
        there = labels != -100
        right = ((logits.argmax(-1) == labels) & there).sum(1)
        return torch.stack([losses.view_as(labels).sum(1), right.float()], dim=1), there.sum(1)


KINDS: dict[str, Kind] = {kind.name: kind for kind in (Multiclass(), Multilabel(), Regression(), LanguageModel())}


def higher_is_better(metric: str) -> bool:
    """Return whether more of the metric of that name, or of a model's ``loss``, is better."""
    lower = (name for kind in KINDS.values() for name, one in kind.metrics.items() if not one.higher_is_better)
    return metric not in ("loss", *lower)
