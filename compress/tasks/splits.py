"""Make a task's splits: read the rows, hold out, limit, and encode the labels."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import random
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

from compress.errors import UserError
from compress.tasks.kinds import KINDS
from compress.tasks.reading import read_tables, take_rows
from compress.tasks.sources import Table
from compress.tasks.task import SPLITS, Task

if TYPE_CHECKING:
    from datasets import Dataset


@dataclasses.dataclass(frozen=True, eq=False)
class Splits:
    """A task's rows: columns ``text``, ``text_pair`` (of pairs) and ``label`` (except for ``lm``).

    ``label`` is an index, a float for regression, or a vector of 0.0 and 1.0 for multi-label. ``task`` is the loaded
    task with its labels; ``notes`` report the rows that were held out, limited and left out.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    task: Task
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def fingerprint(self) -> str:
        """Return a digest of all rows and the names of the labels."""
        parts = [*(self.task.labels or ()), *(hash_rows(getattr(self, split)) for split in SPLITS)]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def load_splits(task: Task, seed: int = 0) -> Splits:
    """Read the rows, hold out missing splits, apply the limits and encode the labels.

    ``seed`` draws the rows held out for validation and the rows that a limit leaves in train. Test and validation
    limits, and a test split held out of train, are drawn the same way for every seed, so that runs with different
    seeds are measured on the same rows.

    Raises:
        UserError: the data is not available, or does not match the task.
    """
    from datasets import Dataset

    # 1) Read the rows and leave out those without a label
    tables, kind = read_tables(task), KINDS[task.kind]
    notes = []
    if not kind.in_blocks:
        for split, table in tables.items():
            labelled = [i for i, label in enumerate(table["label"]) if not kind.is_missing(label)]
            if dropped := len(table["label"]) - len(labelled):
                notes.append(f"{split}: {dropped:,} rows without a label left out")
                tables[split] = take_rows(table, labelled)

    # 2) Hold out the splits that the data set lacks
    for split, draw in (("test", 0), ("validation", seed)):
        if split not in tables:
            tables["train"], tables[split] = _hold_out(task, tables["train"], split, draw)
            size = len(tables[split]["text"])
            notes.append(f"{split}: {size:,} rows held out of train (task.holdout.{split})")

    # 3) Limit the rows
    for split, draw in (("train", seed), ("validation", 0), ("test", 0)):
        limit, size = getattr(task.limit, split), len(tables[split]["text"])
        if not size:
            raise UserError(f"Task `{task.name}` has no rows in {split}. Set task.path to other data.")
        if limit and limit < size:
            tables[split] = take_rows(tables[split], sorted(random.Random(draw).sample(range(size), limit)))
            notes.append(f"{split}: {limit:,} of {size:,} rows (task.limit.{split})")

    # 4) Encode the labels
    task = _find_labels(task, tables["train"])
    encoded = {}
    for split in SPLITS:
        table = {name: column for name, column in tables[split].items() if name != "group"}
        if not kind.in_blocks:
            table["label"] = kind.encode(task, table["label"], split)
        encoded[split] = Dataset.from_dict(table)
    return Splits(**encoded, task=task, notes=tuple(notes))


def _hold_out(task: Task, table: Table, split: str, seed: int) -> tuple[Table, Table]:
    share = getattr(task.holdout, split)
    total = len(table["text"])
    size = share if isinstance(share, int) else max(1, round(share * total))
    if size >= total:
        raise UserError(
            f"Task `{task.name}` has {total:,} rows and {size:,} of them are to be held out for {split}. Set "
            f"task.holdout.{split} to less."
        )
    if KINDS[task.kind].in_blocks and "group" not in table:
        # Neighbouring documents may belong to one story. Only the end of train is sure to be unseen in training.
        held: Sequence[int] = range(total - size, total)
    else:
        held = draw_held_out_rows(table.get("group", table["text"]), size, seed)
    kept = sorted(set(range(total)) - set(held))
    return take_rows(table, kept), take_rows(table, held)


def _find_labels(task: Task, train: Table) -> Task:
    kind = KINDS[task.kind]
    if kind.num_labels is not None:
        return dataclasses.replace(task, labels=())
    if task.labels is not None:
        return task
    return dataclasses.replace(task, labels=kind.find_label_names(train["label"]))


def hash_rows(dataset: Dataset) -> str:
    """Return a digest of the rows that does not depend on the machine or on library versions."""
    digest = hashlib.blake2b(digest_size=16)
    for batch in dataset.iter(batch_size=10_000):
        digest.update(json.dumps(batch, sort_keys=True).encode())
    return digest.hexdigest()


def draw_held_out_rows(groups: Sequence[Hashable], size: int, seed: int) -> list[int]:
    """Draw whole groups until they have at least ``size`` rows, and return these rows in their old order.

    Rows of one group (the utterances of a dialogue, or copies of one text) stay together, so that training sees
    nothing of the held-out rows.
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
        held += rows[group]
    return sorted(held)
