"""Read labels as data sets spell them, and encode them for training."""

from __future__ import annotations

import functools
import io
import json
import math
import re
import tokenize
from ast import literal_eval
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

from compress.errors import UserError

Columns = dict[str, list[Any]]
"""A column of labels for every split."""
WHOLE = re.compile(r"[-+]?\d+(\.0*)?", re.ASCII)
NUMBER = re.compile(r"[-+]?\d+(\.\d*)?", re.ASCII)
LIST = re.compile(r"\[.*\]|\((.*,.*)?\)|\{.*\}|set\(\)", re.DOTALL)
"""What looks like a list, a tuple or a set that was written as text."""
SEPARATORS = ",;|"


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


class LabelError(UserError):
    """A label that cannot be read, in the row ``row`` of ``split``; whoever knows the file adds its name."""

    def __init__(self, message: str, split: str, row: int) -> None:
        super().__init__(message)
        self.split, self.row = split, row


@dataclass(frozen=True)
class Labels:
    """The labels of every split, and the names of all labels as far as the data is not needed to find them."""

    columns: Columns
    names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


# One label


def is_blank(label: Any) -> bool:
    """Return whether a label is missing: None, NaN or blank."""
    return label is None or (isinstance(label, float) and math.isnan(label)) or not str(label).strip()


def label_text(label: Any) -> str:
    """Return a label as text; booleans and whole floats, as in parquet and json, become whole numbers, and so does the
    text ``1.0``, as pandas writes 1 in a column with missing values.

    Raises:
        ValueError: the label is a list or an object.
    """
    if not isinstance(label, (str, bool, int, float)) and (hasattr(label, "__iter__") or isinstance(label, bytes)):
        raise ValueError(
            f"`{str(label)[:60]}` is neither a name nor a number. Set task.columns.label to another column"
        )
    if isinstance(label, bool) or (isinstance(label, float) and label.is_integer()):
        return str(int(label))
    text = str(label).strip()
    return str(int(float(text))) if "." in text and WHOLE.fullmatch(text) else replace_surrogates(text)


def replace_surrogates(text: str) -> str:
    """Return the text with U+FFFD for half a surrogate pair, which JSON can escape and UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return re.sub("[\ud800-\udfff]", "\ufffd", text)
    return text


def sort_label_names(labels: Iterable[Any]) -> tuple[str, ...]:
    """Return the distinct names of all labels in order; in numeric order if all are numbers."""
    names = {label_text(label) for label in labels}
    numbers = all(NUMBER.fullmatch(name) for name in names)
    return tuple(sorted(names, key=(lambda name: (float(name), name)) if numbers else None))


def build_name_reader(names: tuple[str, ...] | None, base: int = 0) -> Callable[[Any], str]:
    """Return the function that maps a label of the data to its name, or to its text if there is no such name.

    A number is the index of a name, counted from ``base``, where the names were given and none is a number itself;
    of two names, False and True are the first and the second.
    """
    given = names or ()
    known = {**{label_text(name): name for name in reversed(given)}, **{name: name for name in given}}
    by_index = not any(NUMBER.fullmatch(name) for name in known)
    indices = {str(index): name for index, name in enumerate(given, start=base)} if by_index else {}
    if by_index and len(given) == 2:
        indices |= dict(zip(("false", "true"), given))

    def read_name(label: Any) -> str:
        text = label_text(label)
        if (name := known.get(str(label).strip()) or known.get(text)) is not None:
            return name
        if names is None and base and WHOLE.fullmatch(text):
            return str(int(text) - base)
        return indices.get(str(label).lower() if isinstance(label, bool) else text.lower(), text)

    return read_name


def read_names(columns: Columns, names: tuple[str, ...] | None, bases: dict[str, int]) -> Labels:
    """Return the labels of texts with one label each as names; None where a label is missing.

    Raises:
        LabelError: a label is a list or an object.
    """

    def build_reader(split: str) -> Callable[[int, Any], str | None]:
        read_name = build_name_reader(names, bases[split])

        @functools.lru_cache(maxsize=10_000, typed=True)  # True, 1 and 1.0 are equal keys
        def read_cell(label: Any) -> str | None:
            if is_list(label) and str(label).strip() not in (names or ()):
                raise ValueError(
                    f"`{str(label)[:60]}` is a list. Set task.kind=multilabel, or task.columns.label to another column"
                )
            return None if is_blank(label) else read_name(label)

        def read(row: int, label: Any) -> str | None:
            try:
                return (read_cell if isinstance(label, str | int | float) else read_cell.__wrapped__)(label)
            except ValueError as error:
                raise LabelError(f"{error}.", split, row) from error

        return read

    readers = {split: build_reader(split) for split in columns}
    read = {split: [readers[split](row, label) for row, label in enumerate(columns[split])] for split in columns}
    return Labels(read, names)


def encode_names(task: LabelledTask, rows: Iterable[Iterable[str]], split: str) -> list[list[int]]:
    """Return the indices of the names in every row.

    Raises:
        LabelError: the task lacks a label.
    """
    assert task.labels is not None  # set, or found in train
    index = {name: i for i, name in enumerate(task.labels)}

    def find_index(name: str, row: int) -> int:
        if name in index:
            return index[name]
        raise LabelError(
            f"Task `{task.name}` has the label `{name[:60]}` in {split}; {', '.join(task.labels[:30])} are known. Set "
            "task.labels to the names of all labels, or task.columns.label to another column.",
            split,
            row,
        )

    return [[find_index(name, row) for name in names] for row, names in enumerate(rows)]


def parse_numbers(task: LabelledTask, labels: list[Any], split: str) -> list[float]:
    """Return the labels as floats.

    Raises:
        LabelError: a label is no finite number.
    """

    def parse(label: Any, row: int) -> float:
        try:
            number = float(label)
            if not math.isfinite(number):
                raise ValueError("NaN or infinity")
        except (TypeError, ValueError) as error:
            raise LabelError(
                f"Task `{task.name}` is {task.kind} and {split} has labels that are not numbers ({error}). Set "
                "task.kind=multiclass, or task.columns.label to a column of numbers.",
                split,
                row,
            ) from error
        return number

    return [parse(label, row) for row, label in enumerate(labels)]


# Several labels


def is_list(label: Any) -> bool:
    """Return whether a label is a list, or the text of one."""
    return isinstance(label, (list, tuple)) or (
        isinstance(label, str) and label.strip().startswith("[") and parse_list(label) is not None
    )


def parse_list(text: str) -> list[Any] | None:
    """Return the list that a text writes in JSON, or as Python or numpy print it (``[0 2]``); None if it is no list."""
    try:
        content = json.loads(text)
        return content if isinstance(content, list) else None
    except ValueError:
        pass
    items: list[Any] = []
    try:
        for token in list(tokenize.generate_tokens(io.StringIO(text.strip()).readline)):
            if token.type in (tokenize.STRING, tokenize.NUMBER) or token.string in ("True", "False"):
                items.append(literal_eval(token.string))
            elif token.string.strip() not in ("", "set", *"[](){},"):
                return None
    except (tokenize.TokenError, SyntaxError, ValueError):
        return None
    return items


def read_words(cell: Any) -> list[str]:
    """Return the words of a text: a list of them, a list that was written as text, or a text with spaces."""
    words = split_cell(cell) if isinstance(cell, str) else [] if cell is None else cell
    return [str(word) for word in words]


def split_cell(text: str) -> list[Any]:
    """Return the items of a list that was written as text, or the words of another text."""
    listed = parse_list(text) if text.lstrip().startswith("[") else None
    return text.split() if listed is None else listed


def read_name_lists(columns: Columns, names: tuple[str, ...] | None, bases: dict[str, int]) -> Labels:
    """Return the labels of texts with any number of labels as lists of names; None where they are missing.

    A cell holds a list, the text of a list, or labels with separators. Lists of 0 and 1 that are all of one length are
    vectors of flags, one for each label.

    Raises:
        LabelError: a cell cannot be read.
    """
    separator = choose_separator(columns, names, bases)
    cells = {
        split: [_parse_cell(cell, names, separator, split, row) for row, cell in enumerate(column)]
        for split, column in columns.items()
    }
    notes = (f"labels are separated by `{separator}`",) if separator != "," else ()
    lists = [cell for cell in chain.from_iterable(cells.values()) if cell is not None]
    lengths = set(map(len, lists))
    flags = {label_text(label) for label in chain.from_iterable(lists)} <= {"0", "1"}
    if flags and len(lengths) == 1 and (count := lengths.pop()) > 1:
        names = names or tuple(map(str, range(count)))
        if len(names) != count:
            raise LabelError(
                f"a vector has {count} flags and task.labels {len(names)} names. Set task.labels to {count} names.",
                *next((split, row) for split in cells for row, cell in enumerate(cells[split]) if cell is not None),
            )
        named = {
            split: [cell and [name for name, flag in zip(names, cell) if label_text(flag) == "1"] for cell in column]
            for split, column in cells.items()
        }
        return Labels(named, names, (*notes, f"labels are read as vectors of {count} flags"))
    return Labels({split: _name_lists(cells[split], names, bases[split], split) for split in cells}, names, notes)


def choose_separator(columns: Columns, names: tuple[str, ...] | None, bases: dict[str, int]) -> str:
    """Return the separator of labels in text: the first by which all are known, or else the only one that occurs.

    Raises:
        LabelError: several occur and no names say which of them separates.
    """
    texts = [
        (split, row, cell)
        for split, column in columns.items()
        for row, cell in enumerate(column)
        if isinstance(cell, str) and not LIST.fullmatch(cell.strip())
    ]
    if names:
        readers = {split: build_name_reader(names, bases[split]) for split in columns}
        several = {(split, cell) for split, _, cell in texts if cell.strip() not in names}
        for mark in SEPARATORS:
            parts = ((split, part) for split, cell in several for part in cell.split(mark) if part.strip())
            if all(readers[split](part) in names for split, part in parts):
                return mark
        return ","
    distinct = {cell for *_, cell in texts}
    found = [mark for mark in SEPARATORS if any(mark in cell for cell in distinct)]
    if len(found) > 1:
        split, row, cell = next(entry for entry in texts if found[1] in entry[2])
        marks = " and ".join(f"`{mark}`" for mark in found)
        raise LabelError(
            f"labels hold {marks}, as in `{cell[:60]}`, and one separator is expected. Set task.labels to the names of "
            "all labels.",
            split,
            row,
        )
    return found[0] if found else ","


def _parse_cell(cell: Any, names: tuple[str, ...] | None, separator: str, split: str, row: int) -> list[Any] | None:
    """Return the labels in a cell; None if it is missing."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return None
    items = [cell]
    if isinstance(cell, (list, tuple)):
        items = list(cell)
    elif isinstance(cell, str):
        text = cell.strip()
        parts = [text] if text in (names or ()) else [part for part in text.split(separator) if part.strip()]
        items = parts
        if LIST.fullmatch(text) and not all(part.strip() in (names or ()) for part in parts):
            listed = parse_list(text)
            if listed is None:
                raise LabelError(
                    f"`{text[:60]}` looks like a list and is none. Set its labels apart by commas, without brackets.",
                    split,
                    row,
                )
            items = listed
    for item in items:
        if (
            is_blank(item)
            or isinstance(item, (list, tuple, dict, bytes))
            or (isinstance(item, float) and not item.is_integer())
        ):
            raise LabelError(
                f"`{str(cell)[:60]}` holds `{str(item)[:60]}`, which is no label. Set task.columns.label to a column "
                "of names, of indices or of 0/1 flags.",
                split,
                row,
            )
    return items


def _name_lists(
    cells: list[list[Any] | None], names: tuple[str, ...] | None, base: int, split: str
) -> list[list[str] | None]:
    read_name = functools.lru_cache(maxsize=10_000, typed=True)(build_name_reader(names, base))
    lists = []
    for row, cell in enumerate(cells):
        if cell and len(set(map(label_text, cell))) < len(cell):
            raise LabelError(
                f"`{str(cell)[:60]}` has a label twice. Set vectors of 0/1 flags of one length in all rows, or every "
                "label once.",
                split,
                row,
            )
        lists.append(None if cell is None else [read_name(label) for label in cell])
    return lists


def parse_flag(value: Any) -> bool:
    """Return whether a 0/1 column says yes.

    Raises:
        ValueError: the value is neither.
    """
    if str(value).strip().lower() in ("1", "1.0", "true"):
        return True
    if str(value).strip().lower() in ("0", "0.0", "false"):
        return False
    raise ValueError(
        f"A column of one label holds `{str(value)[:60]}`; 0 or 1 is expected. Set task.columns.label or task.labels."
    )
