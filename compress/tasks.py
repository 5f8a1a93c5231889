"""What is learned: a data set in three splits, its labels, and the numbers that judge a model on it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import random
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from compress import sources
from compress.errors import UserError
from compress.labels import encode, is_missing, is_set, names, rebased
from compress.metrics import METRICS
from compress.sources import STRICT, Columns, Hub, Layout, Table

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "validation", "test")
Share = Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)] | None
Rows = Annotated[int, Field(ge=1)] | None


@dataclass(frozen=True, config=STRICT)
class Holdout:
    """How much of train, as a fraction or in rows, becomes a split that the data set does not have."""

    validation: Share = None
    test: Share = None


@dataclass(frozen=True, config=STRICT)
class Limit:
    """The most rows to use of each split."""

    train: Rows = None
    validation: Rows = None
    test: Rows = None


@dataclass(frozen=True, config=STRICT)
class Task:
    """A task as its YAML tells it: ``Task(**yaml)``.

    Its rows are generated (``generate``), read from a local folder (``path``, in one of the layouts of ``files``) or
    from the Hugging Face ``hub``. ``rows`` says what a row is where a table does not: an utterance of a dialogue, or an
    article of WikiText. ``labels`` are the names of the labels in the order of their indices; null finds them in train.

        Task(**yaml.safe_load(open("conf/task/toy.yaml"))).load(seed=0).test[0]
    """

    name: str
    kind: Literal["multiclass", "multilabel", "regression", "lm"]
    metrics: tuple[str, ...]
    primary: str
    labels: tuple[str, ...] | None = None
    generate: Literal["toy"] | None = None
    hub: Hub | None = None
    path: str | None = None
    files: tuple[Layout, ...] = ()
    rows: Literal["table", "dialogues", "articles"] = "table"
    columns: Columns = Columns()
    holdout: Holdout = Holdout()
    limit: Limit = Limit()
    max_length: Annotated[int, Field(ge=2)] = 128
    epochs: Annotated[int, Field(ge=0)] = 3
    batch_size: Annotated[int, Field(ge=1)] = 32

    def __post_init__(self) -> None:
        legal = METRICS[self.kind]
        wrong = [name for name in self.metrics if name not in legal]
        if wrong or not self.metrics:
            raise UserError(
                f"Task `{self.name}` is {self.kind} and asks for the metrics {', '.join(wrong) or 'none'}: set "
                f"task.metrics to some of {', '.join(legal)}."
            )
        if self.primary not in self.metrics:
            raise UserError(
                f"Task `{self.name}` has the primary metric {self.primary}, which it does not measure: set "
                f"task.primary to one of {', '.join(self.metrics)}."
            )
        fewest = 2 if self.kind in ("multiclass", "multilabel") else 0
        if self.labels is not None and len(set(self.labels)) < max(len(self.labels), fewest):
            raise UserError(
                f"Task `{self.name}` has the labels {', '.join(self.labels) or 'none'}: set task.labels to the name of "
                "each label, once."
            )
        if self.kind == "multilabel" and self.labels is None and self.columns.label is None:
            raise UserError(
                f"Task `{self.name}` names neither its labels nor their column: set task.labels to the names of the "
                "0/1 columns, or task.columns.label to a column of lists."
            )
        for splits in (self.hub, *self.files):
            named = [name for split in SPLITS if (name := getattr(splits, split, None))]
            if any(count > 1 for count in Counter(map(str, named)).values()):
                raise UserError(
                    f"Task `{self.name}` uses one set of rows for two of its splits ({', '.join(map(str, named))}): "
                    "give each its own, or null and task.holdout."
                )

    @property
    def num_labels(self) -> int:
        """How many numbers a model gives for a text; 1 for regression, 0 for ``lm``, where the vocabulary decides."""
        if self.kind in ("regression", "lm"):
            return int(self.kind == "regression")
        if self.labels is None:
            raise UserError(
                f"Task `{self.name}` finds its labels in its training data: read it first (`task.load().task`), or set "
                "task.labels."
            )
        return len(self.labels)

    def load(self, seed: int = 0) -> Splits:
        """Read, hold out, cut to the limits and encode the labels.

        ``seed`` draws what is held out for validation and which rows a limit leaves in train. Test and validation
        limits, and a test split held out of train, are drawn the same way for every seed, so that runs with different
        seeds are measured on the same rows.

        Raises:
            UserError: the data is not at hand, or is not what the task says it is.
        """
        from datasets import Dataset

        tables = self._read()
        notes = []
        if self.kind != "lm":
            for split, table in tables.items():
                labelled = [i for i, label in enumerate(table["label"]) if not is_missing(label, self.kind)]
                if dropped := len(table["label"]) - len(labelled):
                    notes.append(f"{split}: {dropped:,} rows without a label left out")
                    tables[split] = _take(table, labelled)
        for split, draw in (("test", 0), ("validation", seed)):
            if split not in tables:
                tables["train"], tables[split] = self._hold_out(tables["train"], split, draw)
                size = len(tables[split]["text"])
                notes.append(f"{split}: {size:,} rows held out of train (task.holdout.{split})")
        for split, draw in (("train", seed), ("validation", 0), ("test", 0)):
            limit, size = getattr(self.limit, split), len(tables[split]["text"])
            if not size:
                raise UserError(f"Task `{self.name}` has no rows in {split}: set task.path to other data.")
            if limit and limit < size:
                tables[split] = _take(tables[split], sorted(random.Random(draw).sample(range(size), limit)))
                notes.append(f"{split}: {limit:,} of {size:,} rows (task.limit.{split})")

        task = self._with_labels(tables["train"])
        encoded = {}
        for split in SPLITS:
            table = {name: column for name, column in tables[split].items() if name != "group"}
            if self.kind != "lm":
                table["label"] = encode(task, table["label"], split)
            encoded[split] = Dataset.from_dict(table)
        return Splits(**encoded, task=task, notes=tuple(notes))

    def _read(self) -> dict[str, Table]:
        """The splits that the data set has, as columns text, text_pair, label and group."""
        if self.generate:
            from compress import toy

            texts = ("text",) if self.kind == "lm" else ("text", "label")
            return {
                s: self._select({name: t[name] for name in texts}, self.columns, s) for s, t in toy.splits().items()
            }
        if self.path is not None:
            return self._read_folder()
        if self.hub is not None:
            return self._read_hub()
        raise UserError(
            f"Task `{self.name}` has no data yet: set task.path to a folder with {self._expected()}, or task.hub to "
            "'{id: owner/name, train: train, test: test}'."
        )

    def _read_hub(self) -> dict[str, Table]:
        assert self.hub is not None
        named = {split: name for split in SPLITS if (name := getattr(self.hub, split))}
        self._check_holdout(named, f"the hub's {self.hub.id}")
        tables = {}
        for split, name in named.items():
            try:
                table = sources.read_hub(self.hub, name)
            except ConnectionError as error:  # what datasets makes of every failed download
                raise UserError(self._not_at_hand("the hub could not be reached for")) from error
            except (OSError, ValueError) as error:  # no such data set, split, configuration or revision
                reason = str(error).strip().splitlines()[0]
                raise UserError(self._not_at_hand(f"the hub answered “{reason}” for")) from error
            tables[split] = self._select(self._parse(table), self.columns, f"{self.hub.id}, {name}")
        return tables

    def _not_at_hand(self, why: str) -> str:
        return (
            f"Task `{self.name}` is not at hand: {why} {self.hub.id}; set task.path=FOLDER to a folder with "
            f"{self._expected()}."
        )

    def _expected(self) -> str:
        return " and ".join(file.file for file in self.files[0].files().values()) if self.files else "its files"

    def _read_folder(self) -> dict[str, Table]:
        assert self.path is not None
        folder, layout = sources.lay_out(self.files, Path(self.path).expanduser())
        files = layout.files()
        missing = set(layout.missing(folder))
        if "train" in missing:
            found = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "nothing"
            raise UserError(
                f"Task `{self.name}` needs {self._expected()} and {folder} has {found}: set task.path, or name the "
                "files in task.files."
            )
        present = {split: file for split, file in files.items() if split not in missing}
        self._check_holdout(present, str(folder), files)
        txt = {"dialogues": "jsonl"}.get(self.rows, "text" if self.kind == "lm" else "tsv")
        tables = {}
        for split, file in present.items():
            table = sources.read_files(folder, file, txt)
            is_text = txt == "text" and list(table) == ["text"]
            parsed = sources.documents(table) if is_text and self.rows == "table" else self._parse(table)
            tables[split] = self._select(parsed, file.columns or self.columns, file.file, file.label_base)
        return tables

    def _check_holdout(self, present: dict[str, Any], where: str, expected: dict[str, Any] | None = None) -> None:
        for split in ("validation", "test"):
            if split not in present and getattr(self.holdout, split) is None:
                file = f" ({expected[split].file})" if expected and split in expected else ""
                raise UserError(
                    f"Task `{self.name}` found no {split} split{file} in {where}: add it, or cut it from train with "
                    f"task.holdout.{split}=0.1."
                )

    def _parse(self, table: Table) -> Table:
        try:
            return {"table": dict, "dialogues": sources.dialogues, "articles": sources.articles}[self.rows](table)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"Task `{self.name}` expected {self.rows} and found columns {', '.join(table)} that do not hold them: "
                "set task.path to other data, or task.rows=table."
            ) from error

    def _select(self, table: Table, columns: Columns, where: str, label_base: int = 0) -> Table:
        """The columns that the task uses, under our names."""

        def column(name: str, key: str) -> list[Any]:
            if name not in table:
                raise UserError(
                    f"Task `{self.name}` found no column `{name}` in {where}, which has {', '.join(table) or 'none'}: "
                    f"set {key} to one of them."
                )
            return table[name]

        parts = (columns.text,) if isinstance(columns.text, str) else columns.text
        texts = [column(name, "task.columns.text") for name in parts]
        selected: Table = {"text": [" ".join(str(part) for part in row if part is not None) for row in zip(*texts)]}
        if columns.text_pair:
            pairs = column(columns.text_pair, "task.columns.text_pair")
            selected["text_pair"] = ["" if text is None else str(text) for text in pairs]
        if self.kind == "lm":
            filled = [i for i, text in enumerate(selected["text"]) if text.strip()]
            return _take(selected, filled)
        if columns.label is None and self.kind == "multilabel":
            assert self.labels is not None  # the constructor has checked it
            flags = [column(label, "task.labels") for label in self.labels]
            selected["label"] = [
                [label for label, flag in zip(self.labels, row) if is_set(flag)] for row in zip(*flags)
            ]
        else:
            labels = column(columns.label or "label", "task.columns.label")
            selected["label"] = [rebased(label, label_base, self.labels) for label in labels] if label_base else labels
        if columns.group:
            selected["group"] = column(columns.group, "task.columns.group")
        return selected

    def _hold_out(self, table: Table, split: str, seed: int) -> tuple[Table, Table]:
        share = getattr(self.holdout, split)
        total = len(table["text"])
        size = share if isinstance(share, int) else max(1, round(share * total))
        if size >= total:
            raise UserError(
                f"Task `{self.name}` has {total:,} rows and {size:,} of them are to be held out for {split}: set "
                f"task.holdout.{split} to less."
            )
        if self.kind == "lm" and "group" not in table:
            # Neighbouring documents may tell one story, so that only the end of train is sure not to be known.
            held: Sequence[int] = range(total - size, total)
        else:
            held = held_out(table.get("group", table["text"]), size, seed)
        kept = sorted(set(range(total)) - set(held))
        return _take(table, kept), _take(table, held)

    def _with_labels(self, train: Table) -> Task:
        if self.kind not in ("multiclass", "multilabel"):
            return dataclasses.replace(self, labels=())
        if self.labels is not None:
            return self
        return dataclasses.replace(self, labels=names(train["label"], self.kind))


@dataclasses.dataclass(frozen=True, eq=False)
class Splits:
    """A task's rows: columns ``text``, ``text_pair`` (of pairs) and ``label`` (but for ``lm``).

    ``label`` is an index, a float for regression, or a vector of 0.0 and 1.0 for multi-label. ``task`` is the task that
    was loaded, with the labels that were found; ``notes`` tell what was held out, limited and left out.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    task: Task
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest of all rows and the names of the labels."""
        parts = [*(self.task.labels or ()), *(fingerprint(getattr(self, split)) for split in SPLITS)]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def fingerprint(dataset: Dataset) -> str:
    """A digest of the rows, whatever machine or library version they were read with."""
    digest = hashlib.blake2b(digest_size=16)
    for batch in dataset.iter(batch_size=10_000):
        digest.update(json.dumps(batch, sort_keys=True).encode())
    return digest.hexdigest()


def held_out(groups: Sequence[Hashable], size: int, seed: int) -> list[int]:
    """Rows of whole groups drawn until there are ``size`` of them, in their old order.

    Rows of one group (the utterances of a dialogue, or copies of one text) stay together, so that nothing of what is
    held out is known from train.
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


def _take(table: Table, rows: Sequence[int]) -> Table:
    return {name: [column[i] for i in rows] for name, column in table.items()}
