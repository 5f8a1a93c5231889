"""Read rows from a data set of the Hugging Face hub, or from a folder of files.

This module knows no splits, labels or models.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from compress.errors import UserError
from compress.hub import offline_if_unreachable
from compress.tasks.formats import Table, read_file

STRICT = ConfigDict(extra="forbid", coerce_numbers_to_str=True)
ROLES = ("system", "user", "assistant")
"""Roles that every chat template has, as far as it has any."""


@dataclass(frozen=True, config=STRICT)
class Columns:
    """The columns of the text, its pair and its label, and of the group whose rows stay in one split.

    Several text columns are joined by a space. Without a ``label``, a multi-label task reads a 0/1 column for each
    label.
    """

    text: str | tuple[str, ...] = "text"
    text_pair: str | None = None
    label: str | None = None
    group: str | None = None


@dataclass(frozen=True, config=STRICT)
class Messages:
    """The form of the messages of a conversation, for tasks of kind ``chat``.

    ``role`` and ``content`` are the keys of a message (of several keys of the content, the first that it has), and
    ``roles`` the chat template's role for each role of the data. ``merge`` joins neighbouring turns of one role.
    ``system`` begins every conversation that has no turn of the system.
    """

    role: str = "role"
    content: str | tuple[str, ...] = "content"
    roles: Mapping[str, str] = dataclasses.field(default_factory=lambda: {role: role for role in ROLES})
    merge: bool = False
    system: str | None = None

    @property
    def contents(self) -> tuple[str, ...]:
        return (self.content,) if isinstance(self.content, str) else self.content


@dataclass(frozen=True, config=STRICT)
class Hub:
    """A data set of the hub and its names for the splits; a split may be a slice such as ``train[:1%]``."""

    id: str
    train: str = "train"
    validation: str | None = None
    test: str | None = None
    config: str | None = None
    folder: str | None = None  # for parquet branches, where configurations are folders
    revision: str | None = None


@dataclass(frozen=True, config=STRICT)
class File:
    """A file of a split, or several by a pattern (``*_dev.tsv``).

    ``names`` are the columns of a file without a header, with ``...`` at the end if rows may have more columns;
    ``columns`` replaces the task's, and ``label_base`` is the number of the first label.
    """

    file: str
    names: tuple[str, ...] | None = None
    columns: Columns | None = None
    label_base: int = 0

    def find_paths(self, folder: Path) -> list[Path]:
        path = folder / self.file
        if path.is_file():
            return [path]
        return [] if Path(self.file).is_absolute() else sorted(p for p in folder.glob(self.file) if p.is_file())


@dataclass(frozen=True, config=STRICT)
class Layout:
    """The files of one published form of a data set; a split that is null is held out of train. Only a retrieval has
    no train, because documents alone can calibrate."""

    train: str | File | None = None
    validation: str | File | None = None
    test: str | File | None = None

    def files(self) -> dict[str, File]:
        named = {"train": self.train, "validation": self.validation, "test": self.test}
        return {split: File(file=f) if isinstance(f, str) else f for split, f in named.items() if f is not None}

    def find_missing(self, folder: Path) -> list[str]:
        return [split for split, file in self.files().items() if not file.find_paths(folder)]


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of one or several files, one after another.

    ``files`` are the files' names and numbers of rows. ``incomplete`` has, for a column that some files lack, the name
    of one of them; its rows are None there. ``notes`` say what the readers decided or left out.
    """

    table: Table
    files: tuple[tuple[str, int], ...]
    incomplete: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def locate_row(self, row: int) -> str:
        """Return the file of a row, counted from 0, and its number in this file, counted from 1 after the header."""
        for name, size in self.files:
            if row < size:
                return f"{name}, row {row + 1}"
            row -= size
        return self.files[-1][0]


def choose_layout(layouts: tuple[Layout, ...], path: Path) -> tuple[Path, Layout]:
    """Return the folder, and the layout with the fewest files missing from it; a path to one file is all of train."""
    if path.is_file():
        # A layout that names the file also describes how to read it.
        named = (f for layout in layouts for f in layout.files().values() if path in f.find_paths(path.parent))
        first = next(named, File(file=path.name))
        file = File(file=path.name, names=first.names, columns=first.columns, label_base=first.label_base)
        return path.parent, Layout(train=file)
    if not path.is_dir():
        raise UserError(f"There is no folder {path}. Set task.path to an existing folder.")
    return path, min(layouts, key=lambda layout: len(layout.find_missing(path)))


def read_hub(hub: Hub, split: str) -> Table:
    """Return one split by ``datasets.load_dataset``, from its cache if the hub cannot be reached."""
    import datasets

    with offline_if_unreachable():
        rows = datasets.load_dataset(hub.id, name=hub.config, data_dir=hub.folder, revision=hub.revision, split=split)
    return rows.to_dict()


def read_files(folder: Path, file: File, txt: str) -> Rows:
    """Return the rows of all files that ``file`` names; ``txt`` is the format of ``.txt`` files: tsv, jsonl or text."""
    paths = file.find_paths(folder)
    if len({path.suffix for path in paths}) > 1:
        names = " and ".join(path.name for path in paths)
        raise UserError(f"{folder} has {names}. Name the file to read in task.files, or move the other away.")
    tables, notes = zip(*(read_file(path, file.names, txt) for path in paths))
    sizes = [max(map(len, table.values()), default=0) for table in tables]
    columns = dict.fromkeys(chain.from_iterable(tables))
    return Rows(
        table={
            name: [value for table, size in zip(tables, sizes) for value in table.get(name, [None] * size)]
            for name in columns
        },
        files=tuple((path.name, size) for path, size in zip(paths, sizes)),
        incomplete={
            name: path.name for name in columns for path, table in zip(paths, tables) if table and name not in table
        },
        notes=tuple(chain.from_iterable(notes)),
    )


def parse_dialogues(table: Table) -> Table:
    """Return the utterances with a strategy, each with the number of its dialogue.

    Records are ``{dialog: [{text, speaker, strategy?}]}``, or lines of text with such records as JSON.
    """
    records = table["dialog"] if "dialog" in table else [json.loads(line)["dialog"] for line in table["text"]]
    rows = [(u["text"], u["strategy"], i) for i, record in enumerate(records) for u in record if u.get("strategy")]
    text, strategy, dialogue = (list(column) for column in zip(*rows)) if rows else ([], [], [])
    return {"text": text, "strategy": strategy, "dialogue": dialogue}


def parse_squad(table: Table) -> Table:
    """Return the questions of SQuAD's articles with their contexts, answers and titles.

    Records are ``{title, paragraphs: [{context, qas: [{id, question, answers}]}]}``; ``is_impossible`` marks a question
    without an answer. The hub's questions are a plain table already.
    """
    if "paragraphs" not in table:
        return table
    rows = [
        (qa["question"], context, [] if qa.get("is_impossible") else qa["answers"], title, qa.get("id"))
        for title, context, qa in iterate_questions(table)
    ]
    names = ("question", "context", "answers", "title", "id")
    return {name: list(column) for name, column in zip(names, zip(*rows) if rows else ([] for _ in names))}


def iterate_questions(table: Table) -> Iterator[tuple[Any, str, dict[str, Any]]]:
    """Yield the title, the context and the record of every question of SQuAD's articles."""
    for title, paragraphs in zip(table.get("title", table["paragraphs"]), table["paragraphs"]):
        for paragraph in paragraphs:
            for record in paragraph["qas"]:
                yield title, paragraph["context"], record


def split_articles(table: Table) -> Table:
    """Return WikiText's articles: from one line `` = Title = `` to the next."""
    text = "\n".join(line.rstrip("\n") for line in table["text"])
    # An empty line follows a title, but no formula such as `` = k = `` inside a paragraph.
    return {"text": _drop_empty_texts(re.split(r"^(?= = (?!=).+(?<!=) = *\n\s*\n)", text, flags=re.MULTILINE))}


def join_rows(table: Table) -> Table:
    """Return the rows that are not blank, each with the line breaks that follow it where all rows are joined by two, as
    in ``"\\n\\n".join(rows)``. A blank row is empty. Rows without line
    breaks, such as a file's lines, get one each."""
    texts = table["text"]
    if texts and not any(text.endswith("\n") for text in texts):
        texts = [f"{text}\n" for text in texts[: -1 if not texts[-1] else None]]
    pieces = [""]
    for text in texts:
        if text.strip() and pieces[-1].strip():
            pieces.append("")
        pieces[-1] += f"{text if text.strip() else ''}\n\n"
    pieces[-1] = pieces[-1].removesuffix("\n\n")
    return {"text": pieces}


def split_documents(table: Table, piece_chars: int = 2000) -> Table:
    """Return the documents, which end at ``<|endoftext|>``.

    Text without this mark is cut at empty lines into pieces of at least ``piece_chars`` characters; text without empty
    lines has a document a line. Pieces keep their order and no text is lost; a story may continue in the next piece.
    """
    text = "\n".join(table["text"])
    if "<|endoftext|>" in text:
        return {"text": _drop_empty_texts(text.split("<|endoftext|>"))}
    if not re.search(r"\n\s*\n", text.strip()):
        return {"text": _drop_empty_texts(text.split("\n"))}
    return {"text": list(_join_paragraphs(_drop_empty_texts(re.split(r"\n\s*\n", text)), piece_chars))}


def _join_paragraphs(paragraphs: list[str], piece_chars: int) -> Iterator[str]:
    piece: list[str] = []
    for paragraph in paragraphs:
        piece.append(paragraph)
        if sum(map(len, piece)) >= piece_chars:
            yield "\n\n".join(piece)
            piece = []
    if piece:
        yield "\n\n".join(piece)


def _drop_empty_texts(texts: list[str]) -> list[str]:
    return [text.strip("\n") for text in texts if text.strip()]
