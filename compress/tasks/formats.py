"""Read the rows of one file, in csv, tsv, JSON, JSON lines, parquet, CoNLL's columns of words, or text.

The files are those that pandas, datasets and spreadsheets write. Every reader returns a table, a dict of columns, and
notes on what it decided or left out.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from compress.errors import UserError

Table = dict[str, list[Any]]
Read = tuple[Table, list[str]]


def read_file(path: Path, names: tuple[str, ...] | None, txt: str) -> tuple[Table, tuple[str, ...]]:
    """Return the table of one file and the notes on it.

    Args:
        path: the file; its suffix says its format.
        names: the columns of a file without a header.
        txt: format of ``.txt`` files: tsv, jsonl, text or conll. CoNLL's files end in many ways, so that with conll
            an unknown ending is read as such.

    Raises:
        UserError: the file has an unknown or a broken format.
    """
    suffix = path.suffix.lower().lstrip(".")
    kind = txt if suffix in ("txt", "raw", "tokens") else suffix
    if txt == "conll" and kind not in READERS:
        kind = txt
    if kind not in READERS:
        raise UserError(f"{path.name} ends in .{suffix}; expected csv, tsv, jsonl, json, parquet or txt.")
    return _read_as(kind, path, names)


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 file of any name that are not blank.

    Lines end at line breaks alone: form feeds and U+2028 are text, unlike in ``str.splitlines``.

    Raises:
        UserError: the file is not UTF-8.
    """
    table, _ = _read_as("text", path, None)
    return [line for line in table["text"] if line.strip()]


def _read_as(kind: str, path: Path, names: tuple[str, ...] | None) -> tuple[Table, tuple[str, ...]]:
    try:
        table, notes = READERS[kind](path, names)
    except (ValueError, KeyError, TypeError, OSError) as error:  # pandas, pyarrow and json errors are ValueErrors
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{path.name} could not be read as {kind} ({reason}). Fix the file, or set task.path."
        ) from error
    return table, tuple(f"{path.name}: {note}" for note in notes)


def decode_file(path: Path) -> str:
    """Return the text of a UTF-8 file with its line ends as they are; a byte order mark is left out.

    Raises:
        ValueError: the file has another encoding; the message names the likely one.
    """
    content = path.read_bytes()
    encoding, line = "UTF-16", 1
    try:
        text = content.decode("utf-8-sig")
        if "\0" not in text.partition("\n")[0]:  # as in UTF-16 without a byte order mark
            return text
    except UnicodeDecodeError as error:
        if not content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            encoding, line = "CP1252", content.count(b"\n", 0, error.start) + 1
    raise ValueError(
        f"line {line} is not UTF-8 but perhaps {encoding}; `iconv -f {encoding} -t UTF-8 {path.name}` converts it"
    )


# Comma- and tab-separated files


@dataclass(frozen=True)
class Quotes:
    """The quotation marks at the beginning of a file's fields.

    ``needed`` counts the quoted fields that hold a quotation mark, a separator or a line break, which is why programs
    quote a field; ``bare`` counts the other quoted ones. ``broken`` is the first line with a mark that is not closed at
    the end of a field, and ``rows_inside`` the first line of a quoted field that seems to hold several rows.
    """

    needed: int = 0
    bare: int = 0
    broken: int | None = None
    rows_inside: int | None = None


def find_quotes(text: str, separator: str) -> Quotes:
    """Return the evidence for or against quoting, from the first field to the first broken quotation mark."""
    columns = text.partition("\n")[0].count(separator)
    start = rf"(?:\A|[{separator}\n])\""
    closed = rf"(?P<field>[^\"]*(?:\"\"[^\"]*)*)\"(?=[{separator}\n]|\r?\n|\r?\Z)"
    needed = bare = 0
    rows_inside = None
    for match in re.finditer(f"{start}(?:{closed})?", text):
        field = match["field"]
        if field is None:
            return Quotes(needed, bare, broken=text.count("\n", 0, match.end()) + 1, rows_inside=rows_inside)
        if not re.search(rf"[\"\r\n{separator}]", field):
            bare += 1
            continue
        needed += 1
        inner = field.split("\n")[1:-1]
        if rows_inside is None and columns and len(inner) > 1 and all(s.count(separator) == columns for s in inner):
            rows_inside = text.count("\n", 0, match.start("field")) + 1
    return Quotes(needed, bare, rows_inside=rows_inside)


def decide_quoting(text: str, separator: str) -> tuple[int, list[str]]:
    """Return how a file quotes its fields, as the ``csv`` module names it, and notes where that was not sure.

    In a csv, fields are quoted unless the marks do not close. In a tsv such as GLUE's, quotation marks are text, unless
    all of them close and some are there for what the field holds, or every line has some.

    Raises:
        ValueError: some quotation marks of a csv close and others do not.
    """
    quotes = find_quotes(text, separator)
    found = quotes.needed + quotes.bare
    lines = [line for line in text.split("\n") if line.strip()]
    if quotes.broken is not None:
        if separator == "\t":
            return csv.QUOTE_NONE, []
        if len({line.count(separator) for line in lines}) > 1:
            raise ValueError(
                f"line {quotes.broken} begins a field with a quotation mark that is not closed at the field's end; "
                "quote the field and double the marks inside"
            )
        return csv.QUOTE_NONE, [
            f"quotation marks are read as text, because the one in line {quotes.broken} is not closed"
        ]
    notes = []
    if separator == "\t" and found:
        if not quotes.needed and quotes.bare < len(lines):
            return csv.QUOTE_NONE, [f"the quotation marks around {quotes.bare:,} fields are read as text"]
        notes.append(f"{found:,} fields are read as quoted")
    if quotes.rows_inside is not None:
        notes.append(
            f"the text in line {quotes.rows_inside} holds lines that look like rows; if a quotation mark begins it by "
            "mistake, double it"
        )
    return csv.QUOTE_MINIMAL, notes


MORE = "..."
"""The last name of the columns of a file whose rows may have more columns, which are not read."""


def _read_csv(path: Path, names: tuple[str, ...] | None) -> Read:
    return _read_separated(path, names, ",")


def _read_tsv(path: Path, names: tuple[str, ...] | None) -> Read:
    return _read_separated(path, names, "\t")


def _read_separated(path: Path, names: tuple[str, ...] | None, expected: str) -> Read:
    import pandas as pd

    # 1) Decide on line ends, separator and quoting
    text = decode_file(path)
    if "\n" not in text:
        text = text.replace("\r", "\n")  # as old Macs end lines; elsewhere a lone carriage return is text
    first = text.partition("\n")[0]
    several = names is None or len(names) > 1
    separator = next((mark for mark in (expected, *",;\t") if several and mark in first), expected)
    quoting, notes = decide_quoting(text, separator)
    if separator != expected:
        notes.append(f"columns are separated by {'tabs' if separator == '	' else f'`{separator}`'}")
    # 2) Read the cells
    options: Any = {"header": None, "dtype": str, "keep_default_na": False, "lineterminator": "\n", "engine": "c"}
    if names and names[-1] == MORE:
        names = names[:-1]
        options["usecols"] = range(len(names))
    frame = pd.read_csv(io.StringIO(text), sep=separator, quoting=quoting, **options)  # as many columns as at first
    cells: list[list[str]] = [frame[column].tolist() for column in frame.columns]
    windows = first.endswith("\r") if names is None else 2 * text.count("\r\n") > text.count("\n")
    if windows:
        _strip_carriage_returns(cells)
    # 3) Name the columns
    if names and len(names) != len(cells):
        raise UserError(
            f"{path.name} has {len(cells)} columns in its first line and {len(names)} are named ({', '.join(names)}). "
            "Set task.files."
        )
    if names is None:
        names = tuple(column.pop(0).strip() for column in cells)
    _check_names([name for name in names if name])  # spreadsheets leave columns without a name
    # 4) Leave out empty rows, and count short ones
    rows = len(cells[0])
    filled = [i for i in range(rows) if len(cells) == 1 or any(column[i].strip() for column in cells)]
    if len(filled) < rows:
        notes.append(f"{rows - len(filled):,} empty rows left out")
        cells = [[column[i] for i in filled] for column in cells]
    if quoting == csv.QUOTE_NONE or '"' not in text:
        wanted = first.count(separator)
        lines = enumerate(text.split("\n"), start=1)
        if short := [number for number, line in lines if line.strip() and line.count(separator) < wanted]:
            notes.append(f"{len(short):,} rows have fewer columns than the first line, such as line {short[0]}")
    return {name: column for name, column in zip(names, cells) if name}, notes


def _strip_carriage_returns(cells: list[list[str]]) -> None:
    """Remove in place the carriage return of every row's line end, which is in its last cell that is not empty."""
    pending: list[int] | range = range(len(cells[0]))
    for column in reversed(cells):
        empty = [i for i in pending if not column[i]]
        for i in pending:
            column[i] = column[i].removesuffix("\r")
        pending = empty


def _check_names(names: list[str]) -> None:
    if repeated := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"it has {names.count(repeated[0])} columns named `{repeated[0]}`; rename all but one")


# JSON


def _read_json(path: Path, _: object) -> Read:
    """Return the objects of a JSON file, or of JSON lines; both come under either suffix."""
    text = decode_file(path)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if text.lstrip().startswith("{"):
        try:
            json.loads(lines[0][1])
        except json.JSONDecodeError:
            pass  # one object over several lines
        else:
            if len(lines) > 1 or path.suffix.lower() != ".json":
                return _parse_records([_parse_line(number, line) for number, line in lines]), []
    return _parse_records(_find_records(json.loads(text, object_pairs_hook=_parse_object))), []


def _parse_line(number: int, line: str) -> Any:
    try:
        return json.loads(line, object_pairs_hook=_parse_object)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from error


def _parse_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        _check_names([name for name, _ in pairs])
    return record


def _find_records(content: Any) -> Any:
    """Return the list of objects in a whole JSON file: the list itself, the list under ``data``, or, as ``to_json`` of
    pandas writes it, columns by the names of their rows or rows by their names."""
    if not isinstance(content, dict):
        return content
    if isinstance(content.get("data"), list):
        return content["data"]
    parts = list(content.values())
    if parts and all(isinstance(part, list) and len(part) == len(parts[0]) for part in parts):
        return [dict(zip(content, row)) for row in zip(*parts)]
    if parts and all(isinstance(part, dict) and part.keys() == parts[0].keys() for part in parts):
        if all(name.isdecimal() for name in parts[0]):
            return [{name: column[row] for name, column in content.items()} for row in parts[0]]
        if all(name.isdecimal() for name in content):
            return parts
    return [content]


def _parse_records(records: Any) -> Table:
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError("expected a list of objects")
    names = dict.fromkeys(chain.from_iterable(records))
    return {name: [record.get(name) for record in records] for name in names}


# CoNLL's columns

CONLLU = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
"""Columns of Universal Dependencies' files."""
DOCUMENT = "-DOCSTART-"
"""The only word of a line that begins a document."""


def _read_conll(path: Path, names: tuple[str, ...] | None) -> Read:
    """Return the sentences of a file with a word a line and empty lines between sentences: every column of the file is
    a list for each sentence. Without ``names`` the first column is ``words`` and the last one ``tags``."""
    # 1) Split the lines
    universal = path.suffix.lower() == ".conllu"
    lines = [line.removesuffix("\r") for line in decode_file(path).split("\n")]
    separator = "\t" if any("\t" in line.strip() for line in lines) else None
    columns = 0
    sentences: list[list[list[str]]] = [[]]
    documents = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            sentences.append([])
            continue
        cells = [cell.strip() for cell in line.split(separator)]
        if universal and (line.startswith("#") or not cells[0].isdecimal()):  # comments, and words of several tokens
            continue
        if cells[0] == DOCUMENT:
            documents += 1
            continue
        columns = columns or len(cells)
        if len(cells) != columns or columns < 2:
            expected = f"{columns} columns, as in the lines before," if columns > 1 else "a word and its tag"
            raise ValueError(f"line {number}, `{line.strip()[:60]}`, has {len(cells)}; {expected} are expected")
        sentences[-1].append(cells)
    # 2) Name the columns
    names = names or (CONLLU if universal else ("words", *(f"column_{i}" for i in range(2, columns)), "tags"))
    if columns and len(names) != columns:
        raise ValueError(f"it has {columns} columns and {len(names)} are named ({', '.join(names)}); set task.files")
    filled = [sentence for sentence in sentences if sentence]
    notes = [f"{documents:,} lines {DOCUMENT} left out"] if documents else []
    return {name: [[cells[i] for cells in sentence] for sentence in filled] for i, name in enumerate(names)}, notes


# Parquet and text


def _read_parquet(path: Path, _: object) -> Read:
    import pyarrow.parquet

    _check_names(pyarrow.parquet.read_schema(path).names)
    return pyarrow.parquet.read_table(path).to_pydict(), []


def _read_text(path: Path, _: object) -> Read:
    return {"text": decode_file(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")}, []


READERS: dict[str, Callable[[Path, tuple[str, ...] | None], Read]] = {
    "csv": _read_csv,
    "tsv": _read_tsv,
    "jsonl": _read_json,
    "json": _read_json,
    "parquet": _read_parquet,
    "text": _read_text,
    "conll": _read_conll,
    "conllu": _read_conll,
    "bio": _read_conll,
    "iob": _read_conll,
    "iob2": _read_conll,
}
