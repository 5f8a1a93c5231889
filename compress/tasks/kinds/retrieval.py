"""Retrieval: documents are found by the cosines of their vectors with a query's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.errors import UserError
from compress.maths import scores
from compress.maths.vectors import DEPTHS, FORMS, JUDGEMENTS, judge_ranking, rank_documents
from compress.tasks.embedding import read_prompts
from compress.tasks.kinds.base import Answers, Metric
from compress.tasks.kinds.embedding import Vector, name_metric, read_column
from compress.tasks.labels import LabelledTask

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


class Retrieval(Vector):
    """A query has relevant documents, which its vector finds among all documents of the collection.

    A row of a split is a document or a query; training compares a query with a relevant document and all other
    documents of the batch.
    """

    name = "retrieval"
    in_collections = True
    metrics = MappingProxyType(
        {
            name_metric(metric, form): Metric(
                scores.mean_value, partial(read_column, column=len(JUDGEMENTS) * place + column)
            )
            for place, form in enumerate(FORMS)
            for column, metric in enumerate(JUDGEMENTS)
        }
    )

    @property
    def loss(self) -> Callable[[Tensor, Tensor], Tensor | None]:
        from compress.maths.vector_losses import contrastive_loss

        return contrastive_loss

    def is_missing(self, label: Any) -> bool:
        return False

    def encode(self, task: LabelledTask, labels: list[Any], split: str) -> list[Any]:
        return labels

    def check_training(self, task: str, train: Dataset, validation: Dataset, key: str, epochs: int) -> None:
        if key == "baseline" or ".finetune" in key:
            require_queries(task, train, key, epochs)
        if epochs > 1 and all(validation["shared"]):
            raise UserError(
                f"{key}.epochs is {epochs}, and task `{task}` has no validation queries to choose the best epoch by. "
                f"Set {key}.epochs=1, or add qrels/dev.tsv."
            )

    def choose_prompts(self, rows: dict[str, list], tokenizer: PreTrainedTokenizerBase) -> list[str]:
        prompts = read_prompts(tokenizer)
        roles = ("document" if shared else "query" for shared in rows.get("shared", [True] * len(rows["text"])))
        return [prompts.get(role, "") for role in roles]

    def tokenise(self, rows: dict[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list]:
        if "label" not in rows:  # text to calibrate on
            return super().tokenise(rows, tokenizer, max_length)
        labels = [
            [float(number), float(shared), find_first_relevant(judged)]
            for number, shared, judged in zip(rows["number"], rows["shared"], rows["label"])
        ]
        return super().tokenise({**rows, "label": labels}, tokenizer, max_length)

    def find_groups(self, rows: Dataset) -> list[list[int]]:
        """Return each query with its first relevant document and its hard negatives; without queries, each document."""
        listed = list(enumerate(zip(rows["shared"], rows["number"], rows["label"])))
        documents = {number: row for row, (shared, number, _) in listed if shared}
        groups = []
        for row, (shared, _, judged) in listed:
            if not shared:
                negatives = [documents[int(number)] for number, grade in judged if grade <= 0]
                groups.append([row, documents[int(find_first_relevant(judged))], *negatives])
        return groups or [[row] for row in documents.values()]

    def make_labels(self, inputs: dict[str, Tensor]) -> Tensor:
        labels = super().make_labels(inputs)
        labels[:, 2] = labels[:, 0]
        return labels

    def collect_answers(self, outputs: np.ndarray, labels: np.ndarray, rows: Dataset | None) -> Answers:
        """Return the judgements of every query's ranking, for each form of vectors, and the numbers of the queries."""
        assert rows is not None  # who is relevant
        places = {(int(number), int(shared)): place for place, (number, shared, _) in enumerate(labels)}
        order = [(row, number) for row, number in enumerate(rows["number"])]
        shared, judged = rows["shared"], rows["label"]
        documents = [(row, number) for row, number in order if shared[row]]
        queries = [(row, number) for row, number in order if not shared[row]]
        if not queries:
            width = len(FORMS) * len(JUDGEMENTS)
            return Answers(np.zeros((0, width), np.float32), np.zeros(0, np.float32), np.zeros(0, int))
        asked, found = (
            outputs[[places[number, role] for _, number in part]] for role, part in enumerate((queries, documents))
        )
        numbers = np.array([number for _, number in documents])
        judgements = []
        for form in FORMS:
            ranked = numbers[rank_documents(asked, found, form, max(DEPTHS))]
            each = []
            for (row, _), ranking in zip(queries, ranked):
                grades = {int(number): grade for number, grade in judged[row] if grade > 0}
                each.append(judge_ranking([grades.get(int(number), 0.0) for number in ranking], grades.values()))
            judgements.append(each)
        answers = np.concatenate(np.array(judgements, dtype=np.float32), axis=1)
        return Answers(answers, np.array([number for _, number in queries]), np.array([row for row, _ in queries]))


def require_queries(task: str, train: Dataset, key: str, epochs: int) -> None:
    """Raise UserError if a collection has no queries for the ``epochs`` of training that ``key`` sets."""
    if all(train["shared"]):
        raise UserError(
            f"{key}.epochs is {epochs} and task `{task}` has no queries to train on. Set {key}.epochs=0, or add "
            "qrels/train.tsv."
        )


def find_first_relevant(judged: list[list[float]]) -> float:
    """Return the number of the document with the highest grade, the first of several; -1 if there is none."""
    return max(judged, key=lambda pair: pair[1])[0] if judged and max(grade for _, grade in judged) > 0 else -1.0
