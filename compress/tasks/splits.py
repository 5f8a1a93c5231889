"""Make a task's splits: read the rows, encode the labels, hold out, and limit."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import random
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

from compress.errors import UserError
from compress.tasks.formats import Table
from compress.tasks.harness import load_prompts
from compress.tasks.kinds import KINDS
from compress.tasks.labels import LabelError, Labels
from compress.tasks.reading import Examples, read_tables, take_rows
from compress.tasks.task import SPLITS, Task

if TYPE_CHECKING:
    from datasets import Dataset


@dataclasses.dataclass(frozen=True, eq=False)
class Splits:
    """A task's rows: columns ``text``, ``text_pair`` (of pairs), ``words`` (of lists of words) and ``label`` (except
    for ``lm`` and ``chat``, whose ``messages`` are a conversation and ``origin`` its file and row).

    ``label`` is an index, a float for regression, a vector of 0.0 and 1.0 for multi-label, or an index for each word.
    ``task`` is the loaded task with its labels; ``notes`` report the rows that were held out, limited and left out.
    ``harness`` are the questions that artifacts are measured on in place of ``test``.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    task: Task
    notes: tuple[str, ...] = ()
    harness: Splits | None = None

    @property
    def measured(self) -> Splits:
        """Return the splits that artifacts are measured on."""
        return self.harness or self

    @functools.cached_property
    def fingerprint(self) -> str:
        """Return a digest of all rows and the names of the labels."""
        return self._digest_rows(*SPLITS)

    @functools.cached_property
    def training_fingerprint(self) -> str:
        """Return a digest of what a training sees: the rows of train and validation, and the names of the labels."""
        return self._digest_rows("train", "validation")

    def _digest_rows(self, *splits: str) -> str:
        parts = [*(self.task.labels or ()), *(hash_rows(getattr(self, split)) for split in splits)]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def load_splits(task: Task, seed: int = 0) -> Splits:
    """Read the rows, encode the labels, hold out missing splits and apply the limits.

    ``seed`` draws the rows held out for validation and the rows that a limit leaves in train. Test and validation
    limits, and a test split held out of train, are drawn the same way for every seed, so that runs with different
    seeds are measured on the same rows.

    Raises:
        UserError: the data is not available, or does not match the task.
    """
    from datasets import Dataset

    if KINDS[task.kind].in_harness:
        task, table, found = load_prompts(task)
        nothing = Dataset.from_dict({name: [] for name in table})
        return Splits(nothing, nothing, Dataset.from_dict(table), task, found)

    # 1) Read the rows, and encode their labels
    examples = read_tables(task)
    notes = [note for part in examples.values() for note in part.notes]
    tables = {split: part.table for split, part in examples.items()}
    if KINDS[task.kind].num_labels is not None:
        task = dataclasses.replace(task, labels=())
    if KINDS[task.kind].labelled:
        task, tables, more = _encode_labels(task, examples)
        notes += more
    _check_filled(task, {split: table["text"] for split, table in tables.items()}, notes)

    # 2) Hold out the splits that the data set lacks
    for split, draw in (("test", 0), ("validation", seed)):
        if split not in tables:
            tables["train"], tables[split] = _hold_out(task, tables["train"], split, draw)
            size = len(list_shared(tables[split])[1])
            notes.append(f"{split}: {size:,} rows held out of train (task.holdout.{split})")

    # 3) Limit the rows
    for split, draw in (("train", seed), ("validation", 0), ("test", 0)):
        shared, own = list_shared(tables[split])
        limit, size = getattr(task.limit, split), len(own)
        if limit and limit < size:
            drawn = own[:limit] if task.rows == "joined" else sorted(random.Random(draw).sample(own, limit))
            tables[split] = take_rows(tables[split], [*shared, *drawn])
            notes.append(f"{split}: {limit:,} of {size:,} rows (task.limit.{split})")

    # 4) Report what bounds the figures, and make the splits
    notes += describe_texts(tables)
    feature = KINDS[task.kind].describe_labels(task.labels or ())
    rows = {}
    for split in SPLITS:
        columns = {name: column for name, column in tables[split].items() if name != "group"}
        rows[split] = Dataset.from_dict(columns)
        if feature is not None:
            rows[split] = rows[split].cast_column("label", feature)
    return Splits(**rows, task=task, notes=tuple(notes))


def _check_filled(task: Task, rows: dict[str, list[Any]], notes: list[str]) -> None:
    """Raise UserError, with the notes on it, if a split has no rows."""
    for split in (split for split, values in rows.items() if not values):
        reasons = [note.removeprefix(f"{split}: ") for note in notes if note.startswith(f"{split}: ")]
        why = f" ({'; '.join(reasons)})" if reasons else ""
        raise UserError(f"Task `{task.name}` has no rows in {split}{why}. Set task.path to other data.")


def _encode_labels(task: Task, examples: dict[str, Examples]) -> tuple[Task, dict[str, Table], list[str]]:
    """Return the task with its labels, the tables with encoded labels and without the rows that have none, and notes.

    Names are found in the whole of train: neither a limit nor the rows held out change what a model's outputs mean.
    """
    kind = KINDS[task.kind]
    kept: dict[str, Sequence[int]] = {split: range(len(part.table["text"])) for split, part in examples.items()}
    try:
        # 1) Bring the labels into one form
        for split, part in examples.items():
            kind.check_rows(part.table, split)
        columns = {split: part.table["label"] for split, part in examples.items()}
        labels = Labels(columns, task.labels)
        if any(part.label_column for part in examples.values()):
            bases = {split: part.label_base for split, part in examples.items()}
            labels = kind.read_labels(columns, task.labels, bases)
        notes = list(labels.notes)
        # 2) Leave out the rows without a label
        for split, column in labels.columns.items():
            kept[split] = [row for row, label in enumerate(column) if not kind.is_missing(label)]
            if dropped := len(column) - len(kept[split]):
                notes.append(f"{split}: {dropped:,} rows without a label left out")
        present = {split: [column[row] for row in kept[split]] for split, column in labels.columns.items()}
        _check_filled(task, present, notes)
        # 3) Find the names, and encode
        names = kind.find_label_names(present["train"]) if labels.names is None else labels.names
        if kind.num_labels is None and len(names) < 2:
            raise UserError(
                f"Task `{task.name}` has one label in train, `{', '.join(names)}`; two or more are expected. Set "
                "task.columns.label to another column, or task.labels to the names of all labels."
            )
        task = dataclasses.replace(task, labels=names)
        tables = {}
        for split, part in examples.items():
            tables[split] = take_rows(part.table, kept[split])
            tables[split]["label"] = kind.encode(task, present[split], split)
    except LabelError as error:
        part = examples[error.split]
        raise UserError(f"{part.locate_label(kept[error.split][error.row])}: {error}") from error
    return task, tables, notes


def describe_texts(tables: dict[str, Table]) -> list[str]:
    """Return notes on empty texts, and on texts of validation and test that are in train as well."""
    notes = []
    pairs = {split: list(zip(*(table[name] for name in ("text", "text_pair") if name in table)))
             for split, table in tables.items()}  # fmt: skip
    shared = {split: list_shared(table)[0] for split, table in tables.items()}
    trained = set(pairs["train"])
    for split in SPLITS:
        size = len(pairs[split])
        if empty := sum(not any(text.strip() for text in texts) for texts in pairs[split]):
            notes.append(f"{split}: {empty:,} of {size:,} texts are empty")
        if split != "train" and (copies := sum(texts in trained for texts in pairs[split]) - len(shared[split])):
            notes.append(f"{split}: {copies:,} of {size:,} texts are in train as well")
    return notes


def _hold_out(task: Task, table: Table, split: str, seed: int) -> tuple[Table, Table]:
    share = getattr(task.holdout, split)
    shared, own = list_shared(table)
    total = len(own)
    size = share if isinstance(share, int) else max(1, round(share * total))
    if size >= total:
        raise UserError(
            f"Task `{task.name}` has {total:,} rows and {size:,} of them are to be held out for {split}. Set "
            f"task.holdout.{split} to less, or task.path to more rows."
        )
    if KINDS[task.kind].in_blocks and "group" not in table:
        # Neighbouring documents may belong to one story. Only the end of train is sure to be unseen in training.
        held: Sequence[int] = range(total - size, total)
    else:
        groups = table.get("group", table["text"])
        held = [own[i] for i in draw_held_out_rows([groups[row] for row in own], size, seed)]
    kept = sorted(set(own) - set(held))
    if not kept:
        raise UserError(
            f"Task `{task.name}` has {total:,} rows of one {'group' if 'group' in table else 'text'} in train, and "
            f"rows that belong together stay in one split, so none can be held out for {split}. Set task.columns to "
            "other columns, or task.path to other data."
        )
    return take_rows(table, [*shared, *kept]), take_rows(table, [*shared, *held])


def list_shared(table: Table) -> tuple[list[int], list[int]]:
    """Return the rows that every split has, such as the documents of a collection, and the others."""
    flags = table.get("shared", [False] * len(table["text"]))
    return [row for row, flag in enumerate(flags) if flag], [row for row, flag in enumerate(flags) if not flag]


def hash_rows(dataset: Dataset) -> str:
    """Return a digest of the rows that does not depend on the machine, on library versions or on files' names."""
    if "origin" in dataset.column_names:
        dataset = dataset.remove_columns("origin")
    digest = hashlib.blake2b(digest_size=16)
    for batch in dataset.iter(batch_size=10_000):
        digest.update(json.dumps(batch, sort_keys=True).encode())
    return digest.hexdigest()


def draw_held_out_rows(groups: Sequence[Hashable], size: int, seed: int) -> list[int]:
    """Draw whole groups until they have at least ``size`` rows, and return these rows in their old order.

    Rows of one group (the utterances of a dialogue, or copies of one text) stay together, so that training sees
    nothing of the held-out rows. A group of more than ``size`` rows, such as all empty texts, is not drawn, unless all
    groups have more: then the smallest is.
    """
    rows: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        rows.setdefault(group, []).append(i)
    order = list(rows)
    random.Random(seed).shuffle(order)
    held: list[int] = []
    for group in order:
        if len(held) >= size:
            break
        held += rows[group] if len(rows[group]) <= size else []
    return sorted(held or rows[min(rows, key=lambda group: len(rows[group]))])
