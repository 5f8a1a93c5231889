"""Embedding: a text is turned into a vector, which an index compares with others."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.errors import UserError
from compress.maths import scores
from compress.maths.vectors import FORMS, compare_pairs, measure_bytes
from compress.tasks.embedding import KEY, read_prompts, settle, write_sentence_transformers
from compress.tasks.kinds.base import Answers, Kind, Metric
from compress.tasks.labels import LabelError, parse_numbers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from datasets import Dataset
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


CODE = """\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(".")
logits = model.encode(["A text."])
"""


def name_metric(metric: str, form: str) -> str:
    """Return the name of a metric of vectors in this form: ``spearman``, or ``spearman_int8``."""
    return metric if form == "float" else f"{metric}_{form}"


def read_column(outputs: np.ndarray, column: int) -> np.ndarray:
    return outputs[:, column]


def roc_auc(outputs: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the area for the examples with a label above 0."""
    return scores.roc_auc(outputs[:, None], labels[:, None], weights)


class Vector(Kind):
    """A kind of task whose model answers with a vector: it pools, scales and stores as sentence-transformers does.

    A row of tokens is a single text. Its label is three numbers, the text's example, its place there and a value, by
    which :mod:`compress.maths.vector_losses` finds the texts to compare.
    """

    auto_class = "AutoModel"
    pipeline = "sentence-similarity"
    num_labels = 0
    distillation_losses = ("vectors", "similarities")
    loading_code = CODE

    @property
    @abstractmethod
    def loss(self) -> Callable[[Tensor, Tensor], Tensor | None]:
        """Return the loss of a batch's vectors and labels."""

    def configure(self, config: PretrainedConfig, task: Any, exported: bool = False) -> None:
        settle(config, task.embedding, exported)

    def adapt_class(self, base: Any) -> Any:
        from compress.tasks.encoders import build_encoder_class

        return build_encoder_class(base, self.name, self.loss)

    def prepare_tokenizer(self, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
        settings = settle(config)
        tokenizer.init_kwargs["prompts"] = settings["prompts"]
        if settings["max_length"]:
            tokenizer.model_max_length = min(tokenizer.model_max_length, settings["max_length"])

    def choose_prompts(self, rows: dict[str, list], tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Return the prompt of every row."""
        return [read_prompts(tokenizer).get("text", "")] * len(rows["text"])

    def tokenise(self, rows: dict[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list]:
        prompted = [f"{prompt}{text}" for prompt, text in zip(self.choose_prompts(rows, tokenizer), rows["text"])]
        labels = {"label": rows["label"]} if "label" in rows else {}
        return super().tokenise({"text": prompted, **labels}, tokenizer, max_length)

    def choose_labels(self, logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """Return labels that compare each text with itself alone."""
        import torch

        from compress.maths.vector_losses import ITSELF

        places = torch.full((len(logits),), float(ITSELF), device=logits.device)
        return torch.stack([torch.arange(len(logits), device=logits.device), places, places], dim=1)

    def make_labels(self, inputs: dict[str, Tensor]) -> Tensor:
        import torch

        numbers = torch.arange(len(inputs["input_ids"]))
        return torch.stack([numbers // 2, numbers % 2, (numbers // 2) % 2], dim=1).float()

    def keep_answers(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the vectors and the labels of the texts."""
        return logits.float(), labels.float()

    def write_files(self, folder: Path, config: PretrainedConfig) -> None:
        write_sentence_transformers(folder, config)

    def describe_outputs(self, config: dict[str, Any]) -> tuple[str, ...]:
        settings, width = config[KEY], config.get("compress", {}).get("width") or config["hidden_size"]
        prompts = [f"`{text}` before a {role}" for role, text in settings["prompts"].items()]
        length = " of length 1" if settings["normalise"] else ""
        asked = f" Write {' and '.join(prompts)}." if prompts else ""
        sizes = {form: measure_bytes(width, form) for form in ("float", "int8", "binary")}
        return (
            f"The logits are the texts' vectors{length}, `[texts, {width}]`; compare them by their cosines.{asked}",
            f"A vector takes {sizes['float']:,} bytes as floats, {sizes['int8']:,} as integers of 8 bits and "
            f"{sizes['binary']:,} as signs; the metrics that end in dim, int8 and binary say what that costs.",
        )


class EmbeddingPairs(Vector):
    """Two texts have a score, which the cosine of their vectors follows. Scores of 0 and 1 are classes of pairs."""

    name = "embedding"
    metrics = MappingProxyType(
        {
            name_metric(metric, form): Metric(score, partial(read_column, column=column))
            for metric, score in {
                "spearman": scores.spearman,
                "pearson": scores.pearson,
                "average_precision": scores.average_precision,
                "roc_auc": roc_auc,
            }.items()
            for column, form in enumerate(FORMS)
        }
    )

    @property
    def loss(self) -> Callable[[Tensor, Tensor], Tensor | None]:
        from compress.maths.vector_losses import cosine_loss

        return cosine_loss

    def check(self, task: Any) -> None:
        if task.columns.text_pair is None and task.generate is None:
            raise UserError(
                f"task.columns.text_pair is null, and task `{task.name}` compares the vectors of two texts. Set "
                "task.columns.text_pair to the column of the second text."
            )

    def encode(self, task: Any, labels: list[Any], split: str) -> list[float]:
        """Return the scores from 0 to 1."""
        low, high = task.embedding.scores
        numbers = parse_numbers(task, labels, split)
        for row, number in enumerate(numbers):
            if not low <= number <= high:
                raise LabelError(
                    f"Task `{task.name}` has the score {number:g} in {split}; {low:g} to {high:g} are expected. Set "
                    "task.embedding.scores to the lowest and the highest score.",
                    split,
                    row,
                )
        return [(number - low) / (high - low) for number in numbers]

    def expand_rows(self, rows: Dataset) -> Dataset:
        """Return the rows with one text each: the two texts of a pair follow each other."""
        from datasets import Dataset

        if "text_pair" not in rows.column_names:
            return rows
        pairs = list(zip(rows["text"], rows["text_pair"], rows["label"]))
        return Dataset.from_dict(
            {
                "text": [text for first, second, _ in pairs for text in (first, second)],
                "label": [[row, place, label] for row, (*_, label) in enumerate(pairs) for place in (0, 1)],
            }
        )

    def find_groups(self, rows: Dataset) -> list[list[int]]:
        return [[i, i + 1] for i in range(0, len(rows), 2)]

    def keep_together(self, lengths: list[int]) -> list[int]:
        return [max(lengths[i - i % 2 : i - i % 2 + 2]) for i in range(len(lengths))]

    def collect_answers(self, outputs: np.ndarray, labels: np.ndarray, rows: Dataset | None) -> Answers:
        """Return the cosines of the pairs, a column for each form of vectors, and their scores."""
        places = np.full((int(labels[:, 0].max()) + 1, 2), -1)
        places[labels[:, 0].astype(int), labels[:, 1].astype(int)] = np.arange(len(labels))
        places = places[(places >= 0).all(1)]
        left, right = places.T
        return Answers(compare_pairs(outputs[left], outputs[right]), labels[left, 2], places)
