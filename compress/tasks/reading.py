"""Read a task's tables: generated, from a local folder, or from the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compress.cache.files import expand_path
from compress.errors import UserError
from compress.tasks import toy, toy_chat, toy_span, toy_tokens
from compress.tasks.collections import read_collection
from compress.tasks.formats import Table, read_file
from compress.tasks.kinds import KINDS
from compress.tasks.labels import is_blank, parse_flag, read_words, replace_surrogates
from compress.tasks.sources import (
    Columns,
    File,
    Rows,
    choose_layout,
    join_rows,
    parse_dialogues,
    parse_squad,
    read_files,
    read_hub,
    split_articles,
    split_documents,
)
from compress.tasks.task import SPLITS, Task

GENERATED: dict[str, Callable[[], dict[str, Table]]] = {
    "toy": toy.generate_splits,
    "toy_chat": toy_chat.generate_splits,
    "toy_embedding": toy.generate_pairs,
    "toy_span": toy_span.generate_splits,
    "toy_tokens": toy_tokens.generate_splits,
}
"""Functions that generate the splits of a toy task."""


@dataclass(frozen=True)
class Examples:
    """The examples of one split: the columns text, text_pair, label and group of ``rows``.

    ``label_column`` is the name of the labels' column in the data, and ``label_base`` the number of the first label.
    """

    table: Table
    rows: Rows
    label_column: str | None = None
    label_base: int = 0
    notes: tuple[str, ...] = ()

    def locate_label(self, row: int) -> str:
        """Return the file, the row and the column of a label."""
        return self.rows.locate_row(row) + (f", column `{self.label_column}`" if self.label_column else "")


def read_tables(task: Task) -> dict[str, Examples]:
    """Return the examples of the data set's splits."""
    if task.generate:
        tables = GENERATED[task.generate]()
        return {split: _select_columns(task, name_rows(table, split), split) for split, table in tables.items()}
    if KINDS[task.kind].in_collections:
        tables, notes = read_collection(task)
        return {
            split: Examples(table, name_rows(table, split), notes=notes if split == next(iter(tables)) else ())
            for split, table in tables.items()
        }
    if task.path is not None:
        return _read_folder(task)
    if task.hub is not None:
        return _read_hub(task)
    raise UserError(
        f"Task `{task.name}` has no data. Set task.path to a folder with {_describe_expected_files(task)}, or "
        "task.hub to '{id: owner/name, train: train, test: test}'."
    )


def read_documents(path: Path) -> list[str]:
    """Return the documents of a file: of its column ``text``, or of a text file.

    Raises:
        UserError: the file cannot be read or holds no text.
    """
    table, _ = read_file(path, None, "text")
    if "text" not in table:
        raise UserError(f"{path} has the columns {list_names(table)}; `text` is expected. Rename a column to text.")
    texts, _ = _read_texts([table["text"]], "text", name_rows(table, path.name))
    documents = split_documents({"text": texts})["text"]
    if not documents:
        raise UserError(f"{path} holds no text. Set another file.")
    return documents


def name_rows(table: Table, name: str) -> Rows:
    """Return a table as the rows of one file of this name."""
    return Rows(table, files=((name, max(map(len, table.values()), default=0)),))


def _read_folder(task: Task) -> dict[str, Examples]:
    assert task.path is not None
    folder, layout = choose_layout(task.files, expand_path(task.path))
    files = layout.files()
    missing = set(layout.find_missing(folder))
    if "train" in missing or "train" not in files:
        names = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "nothing"
        raise UserError(
            f"Task `{task.name}` needs {_describe_expected_files(task)} and {folder} has {names}. Set task.path, "
            "or name the files in task.files."
        )
    present = {split: file for split, file in files.items() if split not in missing}
    _check_holdout(task, present, str(folder), files)
    txt = {"dialogues": "jsonl"}.get(task.rows, KINDS[task.kind].txt)
    examples = {}
    for split, file in present.items():
        rows = read_files(folder, file, txt)
        if txt == "text" and list(rows.table) == ["text"] and task.rows == "table":
            texts, notes = _read_texts([rows.table["text"]], "text", rows)
            rows = replace(rows, table=split_documents({"text": texts}), notes=(*rows.notes, *notes))
        examples[split] = _select_columns(task, _parse_rows(task, rows, file.file), split, file)
    return examples


def _read_hub(task: Task) -> dict[str, Examples]:
    assert task.hub is not None
    named = {split: name for split in SPLITS if (name := getattr(task.hub, split))}
    _check_holdout(task, named, f"the hub's {task.hub.id}")
    examples = {}
    for split, name in named.items():
        try:
            table = read_hub(task.hub, name)
        except ConnectionError as error:  # raised by datasets for every failed download
            raise UserError(_describe_missing_data(task, "the hub could not be reached for")) from error
        except (OSError, ValueError) as error:  # no such data set, split, configuration or revision
            reason = str(error).strip().splitlines()[0]
            raise UserError(_describe_missing_data(task, f"the hub answered “{reason}” for")) from error
        where = f"{task.hub.id}, {name}"
        examples[split] = _select_columns(task, _parse_rows(task, name_rows(table, where), where), split)
    return examples


def _check_holdout(task: Task, present: dict[str, Any], where: str, expected: dict[str, Any] | None = None) -> None:
    for split in ("validation", "test"):
        if split not in present and getattr(task.holdout, split) is None:
            file = f" ({expected[split].file})" if expected and split in expected else ""
            raise UserError(
                f"Task `{task.name}` has no {split} split{file} in {where}. Add the split, or cut it from train with "
                f"task.holdout.{split}=0.1."
            )


ROWS = {"dialogues": parse_dialogues, "articles": split_articles, "joined": join_rows, "squad": parse_squad}
"""What makes a plain table of the other forms of rows."""


def _parse_rows(task: Task, rows: Rows, where: str) -> Rows:
    """Return the rows that dialogues, articles or SQuAD's hold; return those of a table as they are."""
    if task.rows == "table":
        return rows
    try:
        table = ROWS[task.rows](rows.table)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"Task `{task.name}` expects {task.rows}, which the columns {list_names(rows.table)} do not hold. Set "
            "task.path to other data, or task.rows=table."
        ) from error
    return replace(name_rows(table, where), notes=rows.notes)


def _select_columns(task: Task, rows: Rows, split: str, file: File | None = None) -> Examples:
    """Return the columns that the task uses, renamed to text, text_pair, label and group."""
    columns, kind = (file and file.columns) or task.columns, KINDS[task.kind]
    if (own := kind.read_rows(rows, columns, task.messages)) is not None:
        own |= _read_groups(task, rows, columns)
        return Examples(own, rows, notes=rows.notes)

    # 1) Read the texts
    names = (columns.text,) if isinstance(columns.text, str) else columns.text
    texts = [_find_column(task, rows, name, "task.columns.text") for name in names]
    table: Table = {}
    table["text"], notes = _read_texts(texts, columns.text, rows)
    if columns.text_pair:
        pairs = _find_column(task, rows, columns.text_pair, "task.columns.text_pair")
        table["text_pair"], more = _read_texts([pairs], columns.text_pair, rows)
        notes += more
    if kind.reads_words:
        table["words"] = _read_word_lists(task, texts, columns)
        table["text"] = [" ".join(words) for words in table["words"]]
    notes = (*rows.notes, *notes)
    if kind.in_blocks:
        return Examples(
            take_rows(table, [i for i, text in enumerate(table["text"]) if text.strip()]), rows, notes=notes
        )

    # 2) Read the labels
    label = None
    if columns.label is None and kind.flag_columns:
        table["label"] = _read_flags(task, rows)
    else:
        label = columns.label or "label"
        if split != "train" and label not in rows.table:
            raise UserError(
                f"Task `{task.name}` has no column `{label}` in {rows.files[0][0]}, which has {list_names(rows.table)} "
                f"and would be a {split} split without labels. Set task.columns.label, or leave {split} out of "
                f"task.files and set task.holdout.{split}=0.1."
            )
        table["label"] = _find_column(task, rows, label, "task.columns.label")
    table |= _read_groups(task, rows, columns)
    if kind.reads_windows and "group" not in table and "text_pair" in table:
        table["group"] = table["text_pair"]
    return Examples(table, rows, label, file.label_base if file else 0, notes)


def _read_groups(task: Task, rows: Rows, columns: Columns) -> Table:
    """Return the column of groups, if there is one."""
    if not columns.group:
        return {}
    groups = _find_column(task, rows, columns.group, "task.columns.group")
    return {"group": [row if is_blank(group) else str(group) for row, group in enumerate(groups)]}


def _find_column(task: Task, rows: Rows, name: str, key: str) -> list[Any]:
    if name not in rows.table:
        where = rows.files[0][0] if len(rows.files) == 1 else "any of its files"
        raise UserError(
            f"Task `{task.name}` has no column `{name}` in {where}, which has {list_names(rows.table)}. Set {key} to "
            "one of these."
        )
    if name in rows.incomplete:
        raise UserError(
            f"Task `{task.name}` has no column `{name}` in {rows.incomplete[name]}, and other files have it. Rename "
            "the column in this file, or name the files to read in task.files."
        )
    return rows.table[name]


def _read_texts(columns: list[list[Any]], name: str | tuple[str, ...], rows: Rows) -> tuple[list[str], tuple[str, ...]]:
    """Return the columns joined by a space as text, and notes; a list of words becomes their text, and a missing
    value none."""

    def join(row: int, cells: tuple[Any, ...]) -> str:
        try:
            return " ".join(text for cell in cells if (text := _read_text(cell)) is not None)
        except ValueError as error:
            raise UserError(
                f"{rows.locate_row(row)}, column `{name}`: {error}. Set task.columns.text (or text_pair) to a column "
                "of text."
            ) from error

    joined = [join(row, cells) for row, cells in enumerate(zip(*columns))]
    texts = [replace_surrogates(text) for text in joined]
    repaired = sum(old != new for old, new in zip(joined, texts))
    return texts, (f"{rows.files[0][0]}: {repaired:,} texts with half a surrogate pair; U+FFFD replaces it",) * bool(
        repaired
    )


def _read_text(cell: Any) -> str | None:
    """Return a cell as text; None if it is missing.

    Raises:
        ValueError: the cell is an object or a list of other things than words.
    """
    if isinstance(cell, str):
        return cell
    if cell is None or cell != cell:  # NaN
        return None
    if isinstance(cell, (list, tuple)) and all(isinstance(word, str) for word in cell):
        return " ".join(cell)
    if isinstance(cell, (list, tuple, dict, bytes)):
        raise ValueError(f"`{str(cell)[:60]}` is not text but {type(cell).__name__}")
    return str(cell)


def _read_word_lists(task: Task, texts: list[list[Any]], columns: Columns) -> list[list[str]]:
    """Return the words of every row, from a column of lists or of text with spaces."""
    if len(texts) > 1 or columns.text_pair:
        raise UserError(
            f"Task `{task.name}` is {task.kind}, which labels the words of one column, and task.columns names several. "
            "Set task.columns.text to one column, and task.columns.text_pair=null."
        )
    return [[replace_surrogates(word) for word in read_words(cell)] for cell in texts[0]]


def _read_flags(task: Task, rows: Rows) -> list[list[str]]:
    """Return the names of every row's labels from a 0/1 column for each label."""
    assert task.labels is not None  # checked by the constructor
    flags = [_find_column(task, rows, label, "task.labels") for label in task.labels]

    def read(row: int, name: str, cell: Any) -> bool:
        try:
            return parse_flag(cell)
        except ValueError as error:
            raise UserError(f"{rows.locate_row(row)}, column `{name}`: {error}") from error

    return [
        [name for name, cell in zip(task.labels, cells) if read(row, name, cell)]
        for row, cells in enumerate(zip(*flags))
    ]


def list_names(names: Iterable[str]) -> str:
    """Return the names of columns as one line of a sentence; those of a file without a header can be whole texts."""
    listed = [" ".join(name[:40].split()) for name in names]
    return ", ".join(listed[:12]) + (f" and {len(listed) - 12} more" if len(listed) > 12 else "") or "none"


def _describe_missing_data(task: Task, why: str) -> str:
    return (
        f"The data of task `{task.name}` is not available: {why} {task.hub.id}. Set task.path=FOLDER to a folder with "
        f"{_describe_expected_files(task)}."
    )


def _describe_expected_files(task: Task) -> str:
    return " and ".join(file.file for file in task.files[0].files().values()) if task.files else "its files"


def take_rows(table: Table, rows: Sequence[int]) -> Table:
    """Return the table with these rows only."""
    return {name: [column[i] for i in rows] for name, column in table.items()}
