"""Reranking: a model that reads a query with a document sorts the documents that a first stage found."""

from __future__ import annotations

from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.errors import UserError
from compress.maths import scores
from compress.maths.vectors import JUDGEMENTS, judge_ranking
from compress.tasks.kinds.base import Answers, Kind, Metric
from compress.tasks.kinds.embedding import read_column
from compress.tasks.kinds.retrieval import require_queries
from compress.tasks.labels import LabelledTask

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

CODE = """\
import torch
from sentence_transformers import CrossEncoder

model = CrossEncoder(".")
logits = model.predict([("A query.", "A document.")], activation_fn=torch.nn.Identity())
"""


class Rerank(Kind):
    """A pair of a query and a document has a number, by which the documents of a query are sorted.

    A row of a split is a document or a query, and a row of tokens is a pair. Its label is the document's grade and the
    query's number.
    """

    name = "rerank"
    metrics = MappingProxyType(
        {
            name: Metric(scores.mean_value, partial(read_column, column=column))
            for column, name in enumerate(JUDGEMENTS)
            if name != "recall_100"
        }
    )
    pipeline = "text-ranking"
    num_labels = 1
    in_collections = True
    loading_code = CODE

    def check(self, task: Any) -> None:
        if task.candidates is None:
            raise UserError(
                f"task.candidates is null, and task `{task.name}` sorts the documents of a first stage. Set "
                "task.candidates=20."
            )

    def check_training(self, task: str, train: Dataset, validation: Dataset, key: str, epochs: int) -> None:
        require_queries(task, train, key, epochs)

    def is_missing(self, label: Any) -> bool:
        return False

    def encode(self, task: LabelledTask, labels: list[Any], split: str) -> list[Any]:
        return labels

    def adapt_class(self, base: Any) -> Any:
        from compress.tasks.encoders import build_judge_class

        return build_judge_class(base, self.name)

    def expand_rows(self, rows: Dataset) -> Dataset:
        """Return a row for every query and document of its list."""
        from datasets import Dataset

        if "shared" not in rows.column_names:  # text to calibrate on
            return rows
        listed = list(zip(rows["shared"], rows["number"], rows["text"], rows["label"]))
        documents = {number: text for shared, number, text, _ in listed if shared}
        pairs = [
            (text, documents[int(number)], [float(grade), float(query)], bool(used))
            for shared, query, text, found in listed
            if not shared
            for number, grade, used in found
        ]
        names = ("text", "text_pair", "label", "used")
        return Dataset.from_dict({name: list(column) for name, column in zip(names, zip(*pairs))})

    def find_groups(self, rows: Dataset) -> list[list[int]]:
        return [[row] for row, used in enumerate(rows["used"]) if used]

    def choose_labels(self, logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        return logits.expand(-1, 2)

    def make_labels(self, inputs: dict[str, Tensor]) -> Tensor:
        import torch

        grades = inputs["input_ids"][:, 0] % 2
        return torch.stack([grades, grades * 0], dim=1).float()

    def collect_answers(self, outputs: np.ndarray, labels: np.ndarray, rows: Dataset | None) -> Answers:
        """Return the judgements of every query's ranking, and the numbers of the queries."""
        assert rows is not None  # who is relevant
        relevant = {
            number: grades
            for shared, number, grades in zip(rows["shared"], rows["number"], rows["relevant"])
            if not shared
        }
        grades, owners, logits = labels[:, 0], labels[:, 1].astype(int), outputs.ravel()
        numbers, first = np.unique(owners, return_index=True)
        by_query = np.split(np.argsort(owners, kind="stable"), np.unique(np.sort(owners), return_index=True)[1][1:])
        judgements = [
            judge_ranking(grades[pairs[np.argsort(-logits[pairs], kind="stable")]].tolist(), relevant[int(number)])
            for number, pairs in zip(numbers, by_query)
        ]
        return Answers(np.array(judgements, dtype=np.float32), numbers, first)
