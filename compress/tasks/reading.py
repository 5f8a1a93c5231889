"""Read a task's tables: generated, from a local folder, or from the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.errors import UserError
from compress.tasks.kinds import KINDS
from compress.tasks.labels import parse_flag, shift_label
from compress.tasks.sources import (
    Columns,
    Table,
    choose_layout,
    parse_dialogues,
    read_files,
    read_hub,
    split_articles,
    split_documents,
)
from compress.tasks.task import SPLITS, Task


def read_tables(task: Task) -> dict[str, Table]:
    """Return the data set's splits as tables with the columns text, text_pair, label and group."""
    if task.generate:
        from compress.tasks.toy import generate_splits

        texts = ("text",) if KINDS[task.kind].in_blocks else ("text", "label")
        return {
            split: _select_columns(task, {name: table[name] for name in texts}, task.columns, split)
            for split, table in generate_splits().items()
        }
    if task.path is not None:
        return _read_folder(task)
    if task.hub is not None:
        return _read_hub(task)
    raise UserError(
        f"Task `{task.name}` has no data. Set task.path to a folder with {_describe_expected_files(task)}, or "
        "task.hub to '{id: owner/name, train: train, test: test}'."
    )


def _read_folder(task: Task) -> dict[str, Table]:
    assert task.path is not None
    folder, layout = choose_layout(task.files, Path(task.path).expanduser())
    files = layout.files()
    missing = set(layout.find_missing(folder))
    if "train" in missing:
        names = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "nothing"
        raise UserError(
            f"Task `{task.name}` needs {_describe_expected_files(task)} and {folder} has {names}. Set task.path, "
            "or name the files in task.files."
        )
    present = {split: file for split, file in files.items() if split not in missing}
    _check_holdout(task, present, str(folder), files)
    txt = {"dialogues": "jsonl"}.get(task.rows, "text" if KINDS[task.kind].in_blocks else "tsv")
    tables = {}
    for split, file in present.items():
        table = read_files(folder, file, txt)
        is_text = txt == "text" and list(table) == ["text"]
        parsed = split_documents(table) if is_text and task.rows == "table" else _parse_table(task, table)
        tables[split] = _select_columns(task, parsed, file.columns or task.columns, file.file, file.label_base)
    return tables


def _read_hub(task: Task) -> dict[str, Table]:
    assert task.hub is not None
    named = {split: name for split in SPLITS if (name := getattr(task.hub, split))}
    _check_holdout(task, named, f"the hub's {task.hub.id}")
    tables = {}
    for split, name in named.items():
        try:
            table = read_hub(task.hub, name)
        except ConnectionError as error:  # raised by datasets for every failed download
            raise UserError(_describe_missing_data(task, "the hub could not be reached for")) from error
        except (OSError, ValueError) as error:  # no such data set, split, configuration or revision
            reason = str(error).strip().splitlines()[0]
            raise UserError(_describe_missing_data(task, f"the hub answered “{reason}” for")) from error
        tables[split] = _select_columns(task, _parse_table(task, table), task.columns, f"{task.hub.id}, {name}")
    return tables


def _check_holdout(task: Task, present: dict[str, Any], where: str, expected: dict[str, Any] | None = None) -> None:
    for split in ("validation", "test"):
        if split not in present and getattr(task.holdout, split) is None:
            file = f" ({expected[split].file})" if expected and split in expected else ""
            raise UserError(
                f"Task `{task.name}` has no {split} split{file} in {where}. Add the split, or cut it from train with "
                f"task.holdout.{split}=0.1."
            )


def _parse_table(task: Task, table: Table) -> Table:
    try:
        return {"table": dict, "dialogues": parse_dialogues, "articles": split_articles}[task.rows](table)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"Task `{task.name}` expects {task.rows}, which the columns {', '.join(table)} do not hold. Set task.path "
            "to other data, or task.rows=table."
        ) from error


def _select_columns(task: Task, table: Table, columns: Columns, where: str, label_base: int = 0) -> Table:
    """Return the columns that the task uses, renamed to text, text_pair, label and group."""

    def column(name: str, key: str) -> list[Any]:
        if name not in table:
            raise UserError(
                f"Task `{task.name}` has no column `{name}` in {where}, which has {', '.join(table) or 'none'}. "
                f"Set {key} to one of these."
            )
        return table[name]

    parts = (columns.text,) if isinstance(columns.text, str) else columns.text
    texts = [column(name, "task.columns.text") for name in parts]
    selected: Table = {"text": [" ".join(str(part) for part in row if part is not None) for row in zip(*texts)]}
    if columns.text_pair:
        pairs = column(columns.text_pair, "task.columns.text_pair")
        selected["text_pair"] = ["" if text is None else str(text) for text in pairs]
    kind = KINDS[task.kind]
    if kind.in_blocks:
        filled = [i for i, text in enumerate(selected["text"]) if text.strip()]
        return take_rows(selected, filled)
    if columns.label is None and kind.flag_columns:
        assert task.labels is not None  # checked by the constructor
        flags = [column(label, "task.labels") for label in task.labels]
        selected["label"] = [
            [label for label, flag in zip(task.labels, row) if parse_flag(flag)] for row in zip(*flags)
        ]
    else:
        labels = column(columns.label or "label", "task.columns.label")
        selected["label"] = [shift_label(label, label_base, task.labels) for label in labels] if label_base else labels
    if columns.group:
        selected["group"] = column(columns.group, "task.columns.group")
    return selected


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
