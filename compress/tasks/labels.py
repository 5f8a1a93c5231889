"""Read labels as data sets spell them, and encode them as a model learns them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from compress.errors import UserError

if TYPE_CHECKING:
    from compress.tasks.task import Task


def sort_label_names(labels: Iterable[Any]) -> tuple[str, ...]:
    """Return the names of all labels, each once, in order: as numbers if all of them are."""
    names = {label_text(label) for label in labels}
    numbers = all(name.lstrip("-").isdigit() for name in names)
    return tuple(sorted(names, key=int if numbers else None))


def build_label_index(task: Task, split: str) -> Callable[[Any], int]:
    """Return the function that maps a label's name, or its index, to its index.

    The function raises UserError for a label that the task does not have.
    """
    names: tuple[str, ...] = task.labels  # type: ignore[assignment]  # given, or found in train
    index = {name: i for i, name in enumerate(names)}

    @functools.cache
    def find_index(name: str) -> int:
        if name in index:
            return index[name]
        if name.isdigit() and int(name) < len(index):
            return int(name)
        raise UserError(
            f"Task `{task.name}` met the label `{name}` in {split} and knows {', '.join(names[:30])}: set "
            "task.labels to the names of all labels, or task.columns.label to another column."
        )

    return lambda label: find_index(label_text(label))


def parse_numbers(task: Task, labels: list[Any], split: str) -> list[float]:
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
            f"Task `{task.name}` is {task.kind} and {split} has labels that are no numbers ({error}): set "
            "task.kind=multiclass, or task.columns.label to a column of numbers."
        ) from error


def label_text(label: Any) -> str:
    """Return a label as text: booleans and whole floats, as parquet and json have them, as whole numbers."""
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
        f"A column of one label must hold 0 or 1 and holds `{value}`: set task.columns.label or task.labels."
    )


def shift_label(label: Any, base: int, labels: tuple[str, ...] | None) -> Any:
    """Return a number that counts from ``base`` as a number that counts from 0, and a name as it is."""
    name = label_text(label)
    return str(int(name) - base) if name.lstrip("-").isdigit() and name not in (labels or ()) else label
