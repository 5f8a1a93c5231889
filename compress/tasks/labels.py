"""Labels however data sets spell them, and as a model learns them."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

from compress.errors import UserError

if TYPE_CHECKING:
    from compress.tasks.task import Task


def is_missing(label: Any, kind: str) -> bool:
    # A multi-label text may have no label at all; an empty one is an answer.
    return label is None or (label == "" and kind != "multilabel")


def find_label_names(labels: list[Any], kind: str) -> tuple[str, ...]:
    """The names of all labels of a classification, in order."""
    found = {
        label_text(item) for label in labels for item in (split_labels(label) if kind == "multilabel" else [label])
    }
    numbers = all(name.lstrip("-").isdigit() for name in found)
    return tuple(sorted(found, key=int if numbers else None))


def encode_labels(task: Task, labels: list[Any], split: str) -> list[Any]:
    """What a model learns of them: indices, numbers, or vectors of 0 and 1.

    Raises:
        UserError: a label is none of the task's, or no number where one is due.
    """
    if task.kind == "regression":
        try:
            numbers = [float(label) for label in labels]
            if not all(map(math.isfinite, numbers)):
                raise ValueError("NaN or infinity")
            return numbers
        except (TypeError, ValueError) as error:
            raise UserError(
                f"Task `{task.name}` is regression and {split} has labels that are no numbers ({error}): set "
                "task.kind=multiclass, or task.columns.label to a column of numbers."
            ) from error
    assert task.labels is not None  # given, or found in train
    index = {name: i for i, name in enumerate(task.labels)}

    @functools.cache
    def index_of(name: str) -> int:
        if name in index:
            return index[name]
        if name.isdigit() and int(name) < len(index):
            return int(name)
        raise UserError(
            f"Task `{task.name}` met the label `{name}` in {split} and knows {', '.join(task.labels[:30])}: set "
            "task.labels to the names of all labels, or task.columns.label to another column."
        )

    if task.kind == "multiclass":
        return [index_of(label_text(label)) for label in labels]
    vectors = []
    for label in labels:
        vector = [0.0] * len(index)
        for item in split_labels(label):
            vector[index_of(label_text(item))] = 1.0
        vectors.append(vector)
    return vectors


def label_text(label: Any) -> str:
    """A label as text: booleans and whole floats, as parquet and json have them, as whole numbers."""
    whole = isinstance(label, bool) or (isinstance(label, float) and label.is_integer())
    return str(int(label) if whole else label).strip()


def split_labels(labels: Any) -> list[Any]:
    """The labels of one text: a list, a single one, or a string with commas."""
    if isinstance(labels, str):
        return [item for item in labels.split(",") if item.strip()]
    return list(labels) if isinstance(labels, (list, tuple)) else [labels]


def parse_flag(value: Any) -> bool:
    if str(value).lower() in ("1", "1.0", "true"):
        return True
    if str(value).lower() in ("0", "0.0", "false"):
        return False
    raise UserError(
        f"A column of one label must hold 0 or 1 and holds `{value}`: set task.columns.label or task.labels."
    )


def shift_label(label: Any, base: int, labels: tuple[str, ...] | None) -> Any:
    name = label_text(label)
    return str(int(name) - base) if name.lstrip("-").isdigit() and name not in (labels or ()) else label
