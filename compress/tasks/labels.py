"""Read labels as data sets spell them, and encode them for training."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from compress.errors import UserError


class LabelledTask(Protocol):
    """The part of a task that its labels need."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def labels(self) -> tuple[str, ...] | None: ...

    @property
    def num_labels(self) -> int: ...


def sort_label_names(labels: Iterable[Any]) -> tuple[str, ...]:
    """Return the distinct names of all labels in order; in numeric order if all are numbers."""
    names = {label_text(label) for label in labels}
    numbers = all(name.lstrip("-").isdigit() for name in names)
    return tuple(sorted(names, key=int if numbers else None))


def build_label_index(task: LabelledTask, split: str) -> Callable[[Any], int]:
    """Return the function that maps a label's name, or its index, to its index.

    The function raises UserError for a label that the task lacks.
    """
    names: tuple[str, ...] = task.labels  # type: ignore[assignment]  # set, or found in train
    index = {name: i for i, name in enumerate(names)}

    @functools.cache
    def find_index(name: str) -> int:
        if name in index:
            return index[name]
        if name.isdigit() and int(name) < len(index):
            return int(name)
        raise UserError(
            f"Task `{task.name}` has the label `{name}` in {split}; {', '.join(names[:30])} are known. Set "
            "task.labels to the names of all labels, or task.columns.label to another column."
        )

    return lambda label: find_index(label_text(label))


def parse_numbers(task: LabelledTask, labels: list[Any], split: str) -> list[float]:
    """Return the labels as floats.

    Raises:
        UserError: a label is no finite number.
    """
    try:
        numbers = [float(label) for label in labels]
        if not all(map(math.isfinite, numbers)):
            raise ValueError("NaN or infinity")
        return numbers
    except (TypeError, ValueError) as error:
        raise UserError(
            f"Task `{task.name}` is {task.kind} and {split} has labels that are not numbers ({error}). Set "
            "task.kind=multiclass, or task.columns.label to a column of numbers."
        ) from error


def label_text(label: Any) -> str:
    """Return a label as text; booleans and whole floats, as in parquet and json, become whole numbers."""
    whole = isinstance(label, bool) or (isinstance(label, float) and label.is_integer())
    return str(int(label) if whole else label).strip()


def split_labels(labels: Any) -> list[Any]:
    """Return the labels of one text, given as a list, a single label, or a string with commas."""
    if isinstance(labels, str):
        return [item for item in labels.split(",") if item.strip()]
    return list(labels) if isinstance(labels, (list, tuple)) else [labels]


def parse_flag(value: Any) -> bool:
    """Return whether a 0/1 column says yes.

    Raises:
        UserError: the value is neither.
    """
    if str(value).lower() in ("1", "1.0", "true"):
        return True
    if str(value).lower() in ("0", "0.0", "false"):
        return False
    raise UserError(
        f"A column of one label holds `{value}`; 0 or 1 is expected. Set task.columns.label or task.labels."
    )


def shift_label(label: Any, base: int, labels: tuple[str, ...] | None) -> Any:
    """Return a label that is numbered from ``base`` as numbered from 0; return a name unchanged."""
    name = label_text(label)
    return str(int(name) - base) if name.lstrip("-").isdigit() and name not in (labels or ()) else label
