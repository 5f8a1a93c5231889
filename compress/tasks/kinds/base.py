"""The contract of a kind of task: what a label is, what a model answers, and which metrics judge the answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from compress.maths.statistics import Score
from compress.tasks.labels import (
    Columns,
    LabelledTask,
    Labels,
    is_blank,
    sort_label_names,
)

if TYPE_CHECKING:
    from pathlib import Path

    from datasets import Dataset
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from compress.tasks.formats import Table
    from compress.tasks.sources import Columns as TextColumns
    from compress.tasks.sources import Messages, Rows


Format = Literal["tsv", "jsonl", "text", "conll"]
Probabilities = Literal["softmax", "sigmoid", "positions"] | None
"""The function from logits to probabilities; ``positions`` is a softmax over the tokens of a text, and None is for a
regression."""


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


class Answers(NamedTuple):
    """A model's answers to the examples of a split, and the row or rows of tokens that each example is of,
    ``[examples]`` or ``[examples, rows]``; None if an example is a row of tokens."""

    outputs: np.ndarray
    labels: np.ndarray
    rows: np.ndarray | None = None


class Kind(ABC):
    """A kind of task; the defaults describe a text with named labels."""

    name: str
    metrics: Mapping[str, Metric]
    """Metrics that may judge a model, by their names in ``task.metrics``."""

    # The data

    txt: Format = "tsv"
    """Format of files that end in ``.txt``."""
    labelled = True
    """Whether a row has a label, beside its text."""
    flag_columns = False
    """Whether 0/1 columns, one for each label, may replace a column of labels."""
    reads_words = False
    """Whether a text is a list of words, which the column ``words`` keeps."""
    in_blocks = False
    """Whether documents are joined and cut into blocks of tokens, which are their own labels."""
    in_collections = False
    """Whether the rows are documents, which every split has, and queries."""
    in_harness = False
    """Whether EleutherAI's harness asks the questions and judges the answers: see :mod:`compress.tasks.harness`."""

    # The tokens

    reads_windows = False
    """Whether long texts are read in overlapping windows, so that nothing is cut off, and texts of one pair stay in one
    split."""
    numbers_rows = False
    """Whether labels carry the row of the split that they are of, so that answers may come in any order."""
    cuts = "are cut to"
    """What happens to rows of more tokens than a model reads, for a note."""
    cut_effect = ""
    """What follows for the metrics if a text is cut to the largest number of tokens."""

    # The model and its head

    auto_class = "AutoModelForSequenceClassification"
    """Class of transformers that puts the head on any architecture."""
    has_own_head = False
    """Whether no other kind has this head, so that the name of a model's class says its kind."""
    problem_type: str | None = None
    """Value in the model's config by which transformers chooses the loss."""
    num_labels: int | None = None
    """Number of outputs for a text; None: one for each label, 0: a head without labels."""
    probabilities: Probabilities = None
    """Function that turns logits into probabilities; None if there are no probabilities."""
    generates = False
    """Whether the model writes text, token by token from left to right."""

    # The model card and the report

    pipeline = "text-classification"
    """Pipeline of transformers, and the tag on the hub."""
    example = '"A text."'
    """Arguments of the tokenizer in the lines of a model card."""
    lines = f'logits = model(**tokenizer({example}, return_tensors="pt")).logits\n'
    """Lines of a model card that run the ``model`` of plain transformers."""
    reading = ""
    """Lines of a model card after those, which read the ``logits`` of any runtime."""
    loading_code: str | None = None
    """Lines that load a model of transformers by another library; None if transformers is enough."""
    slice_prefix = "label"
    """Noun before the names of :meth:`slice_labels`."""

    @property
    def unit(self) -> str:
        """Return the plural name of a model's input."""
        return "blocks" if self.in_blocks else "texts"

    @property
    def distillation_losses(self) -> tuple[str, ...]:
        """Return the losses between a student's answers and its teacher's that fit, the default first."""
        return ("ce", "kl", "mse", "reverse_kl", "js") if self.probabilities else ("mse",)

    def check(self, task: Any) -> None:
        """Raise UserError if settings of a ``task`` of this kind contradict each other."""
        return

    def check_training(self, task: str, train: Dataset, validation: Dataset, key: str, epochs: int) -> None:
        """Raise UserError if the rows of the ``task`` do not allow the ``epochs`` of training that ``key`` sets."""
        return

    # From a data set to texts and labels

    def read_rows(self, rows: Rows, columns: TextColumns, messages: Messages) -> Table | None:
        """Return the columns of the examples, with at least ``text``; None if the rows are texts and labels.

        Raises:
            UserError: a row cannot be read; the message names its file and row.
        """
        return None

    def check_encoding(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise UserError, naming file and row, if a model's ``tokenizer`` cannot encode the rows of a split."""
        return

    def check_rows(self, table: Mapping[str, list[Any]], split: str) -> None:
        """Raise LabelError if a row contradicts itself: the ``table`` has the texts and the labels as they were read
        and, of lists of words, ``words``."""
        return

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

    def describe_labels(self, names: tuple[str, ...]) -> Any:
        """Return the feature of ``datasets`` that keeps the names beside the labels; None if nothing needs them."""
        return None

    # From texts to batches

    def expand_rows(self, rows: Dataset) -> Dataset:
        """Return a row for each row of tokens, if a row of the split is several texts."""
        return rows

    def find_groups(self, rows: Dataset) -> list[list[int]] | None:
        """Return the :meth:`expand_rows` that a training batch keeps together, because the loss compares them; None if
        each row has a loss of its own. Groups may share rows."""
        return None

    def keep_together(self, lengths: list[int]) -> list[int]:
        """Return the ``lengths`` by which the rows of tokens are sorted: equal for neighbours that stay together."""
        return lengths

    def set_template(self, tokenizer: PreTrainedTokenizerBase, template: str | None, new: bool = False) -> None:
        """Prepare the tokenizer of a model for the kind; ``template`` is the task's, and a ``new`` tokenizer was
        trained on its text.

        Raises:
            UserError: the tokenizer lacks something that the kind needs.
        """
        return

    def count_cut(self, rows: Dataset, texts: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> int:
        """Return how many of the ``texts`` have more tokens than ``max_length``; ``rows`` are their tokens, cut."""
        cut = 0
        full = [i for i, ids in enumerate(rows["input_ids"]) if len(ids) >= max_length]
        for batch in texts.select(full).iter(1000):
            whole = tokenizer(batch["text"], batch.get("text_pair"), verbose=False)["input_ids"]  # type: ignore[call-overload]
            cut += sum(len(ids) > max_length for ids in whole)
        return cut

    def tokenise(self, rows: dict[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list]:
        """Return the model's input columns, and ``labels`` if the rows have labels; the ``input_ids`` of whole
        documents, if the kind cuts them into blocks.

        ``rows["row"]`` has the number of each row in its split. A text without tokens, such as an empty one where the
        tokenizer adds none, gets one special token.
        """
        encoded = dict(tokenizer(rows["text"], rows.get("text_pair"), truncation=True, max_length=max_length))
        for i, ids in enumerate(encoded["input_ids"]):
            if not ids:
                for name, column in encoded.items():
                    column[i] = [int(name == "attention_mask")]
                encoded["input_ids"][i] = [choose_filler(tokenizer)]
        return {**encoded, "labels": rows["label"]} if "label" in rows else encoded

    def collate(self, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
        """Return the columns of :meth:`tokenise` as one padded batch, with ``labels`` if the rows have some."""
        from transformers import DataCollatorWithPadding

        labels = [row.pop("labels") for row in rows] if "labels" in rows[0] else None
        batch = dict(DataCollatorWithPadding(tokenizer)(rows))
        encoded = self.collate_labels(labels, batch)
        return batch if encoded is None else {**batch, "labels": encoded}

    def collate_labels(self, labels: list[Any] | None, batch: dict[str, Tensor]) -> Tensor | None:
        """Return the labels of a padded batch; None if its rows have no labels."""
        import torch

        return None if labels is None else torch.tensor(labels)

    def pack(self, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, Any]:
        """Return the rows as one batch for training in which several rows may share a line of ``max_length`` tokens
        without seeing each other."""
        return self.collate(rows, tokenizer)

    def find_tokens(self, batch: dict[str, Any]) -> Tensor:
        """Return a mask ``[batch, tokens]`` of the tokens that are not padding."""
        return batch["attention_mask"]

    def count_examples(self, batch: dict[str, Tensor]) -> int | Tensor:
        """Return how many labels the mean loss of a batch is of."""
        return len(batch["input_ids"])

    def choose_labels(self, logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """Return a model's predictions on a batch as labels for a loss."""
        return logits.argmax(-1)

    def mask_answers(self, inputs: dict[str, Tensor], labels: Tensor | None) -> Tensor:
        """Return ``[batch, tokens]``, nonzero where the logits of a token are an answer. A batch may have no labels."""
        return self.find_tokens(inputs)

    # From batches to a model's answers

    def configure(self, config: PretrainedConfig, task: Any, exported: bool = False) -> None:
        """Write settings of the ``task`` that decide the model's answers into its config: before the model is built, or
        before an artifact, maybe an ``exported`` graph, is measured on another task.

        Raises:
            UserError: the architecture does not fit this kind.
        """
        return

    def prepare_tokenizer(self, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
        """Give a loaded tokenizer the settings of the model's ``config`` that decide a text's tokens."""
        return

    def write_files(self, folder: Path, config: PretrainedConfig) -> None:
        """Write files that other libraries need beside a model of transformers in an artifact's ``folder``."""
        return

    def describe_outputs(self, config: dict[str, Any]) -> tuple[str, ...]:
        """Return sentences for the model card on the logits of this kind; ``config`` is the artifact's config.json."""
        return ()

    def make_labels(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return labels of a batch of random tokens, for :mod:`compress.testing`: they depend on the first token."""
        return inputs["input_ids"][:, 0] % 3

    def adapt_class(self, base: Any) -> Any:
        """Return the class of a model whose output has ``.logits``, and ``.loss`` if the batch has labels.

        Args:
            base: the class of transformers, of this kind's ``auto_class``. A subclass of it has the name of ``base``
                and the attribute ``task_kind``, keeps the names of the weights, and is made once for each ``base``.
        """
        return base

    # From a model's answers to scores

    def keep_answers(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a batch adds to the outputs and labels, one row for each of the batch."""
        return logits.float(), labels

    def collect_answers(self, outputs: np.ndarray, labels: np.ndarray, rows: Dataset | None) -> Answers:
        """Return the outputs and labels that every metric is computed from, one example a row.

        Args:
            outputs: what :meth:`keep_answers` kept of all batches, in any order.
            labels: the same of the labels.
            rows: the rows of the split before tokenising.
        """
        return Answers(outputs, labels)

    def counts_examples(self, metric: str, labels: np.ndarray) -> bool:
        """Return whether a metric is the share of the examples that :meth:`find_correct` finds correct."""
        return self.metrics[metric].counts_examples

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
